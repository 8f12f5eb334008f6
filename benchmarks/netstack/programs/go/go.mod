module contenders

go 1.22
