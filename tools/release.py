"""release.py [FOLDER]: prints what is still to be done before a release of the checkout.

These are the things that can't be true earlier, so the tests don't ask for them. Prints one line
for each, and exits with 1 if there is any.
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

_IMAGE = re.compile(r"^ *(?:- +)?(?:image|container): *(\w\S*)", re.M)
_USES = re.compile(r"^ *(?:- +)?uses: *(\S+)", re.M)


def todo(folder: Path) -> Iterator[str]:
    text = (folder / "pyproject.toml").read_text()
    version = tomllib.loads(text)["project"]["version"]
    if "//aiotun.example" in text:
        yield "pyproject.toml: replace aiotun.example by the place where the project is published"
    if "dev" in version:
        yield f"pyproject.toml: remove .devN from the version {version}"
    changelog = (folder / "CHANGELOG.md").read_text()
    if re.search(r"^## \[.*unreleased", changelog, re.M):
        yield "CHANGELOG.md: replace 'unreleased' with the date"
    for path in sorted((folder / ".github" / "workflows").glob("*.yml")):
        workflow = path.read_text()
        name = path.relative_to(folder)
        for image in _IMAGE.findall(workflow):
            if not re.search(r"@sha256:[0-9a-f]{64}$", image):
                tag = image.partition("@")[0]
                yield (
                    f"{name}: pin the container {tag} by its digest, which "
                    f"'docker buildx imagetools inspect {tag}' prints: {tag}@sha256:..."
                )
        for action in _USES.findall(workflow):
            if not re.search(r"@[0-9a-f]{40}$", action):
                yield f"{name}: pin the action {action} by its commit"


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    lines = list(todo(folder))
    for line in lines:
        print(line)
    if not lines:
        print("nothing is left to be done before a release")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
