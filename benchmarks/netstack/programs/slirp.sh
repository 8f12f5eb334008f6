# slirp.sh COMMAND [ARGUMENT ...]: runs a command behind slirp4netns, which by itself only serves a
# namespace that somebody else has made. slirp4netns keeps this process's ID, and ends when the last
# process of the command closes the pipe "end".
folder=$(mktemp -d)
mkfifo "$folder/made" "$folder/ready" "$folder/end"
exec 5<&0 # a command in the background would get /dev/null
unshare --user --map-root-user --net sh -c '
    echo $$ >"$0/made"
    exec 9>"$0/end"
    read -r _ <"$0/ready"
    rm -r "$0"
    exec "$@"' "$folder" "$@" <&5 &
read -r pid <"$folder/made"
exec slirp4netns --configure --mtu=65520 --disable-host-loopback --ready-fd=3 --exit-fd=4 \
    "$pid" tap0 4<"$folder/end" 3>"$folder/ready" 5<&- >/dev/null 2>&1
