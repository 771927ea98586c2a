#!/usr/bin/env bash
# Builds the CPU image by build.sh and runs it as its own user: version, doctor, and the demo with its promises.
#
#   helm/image/try.sh
#
# BASE: an image of Debian with Python, by its digest; without it one is made by debootstrap. It needs root, buildah, an
# index of Python packages and five minutes of two idle cores. What it makes lies in one folder, which goes at the end.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
for tool in buildah $([[ -n ${BASE:-} ]] || echo debootstrap); do
    command -v "$tool" > /dev/null || { echo "skipped: no $tool on the PATH (Debian: apt-get install $tool)"; exit 0; }
done
[[ $(id -u) == 0 ]] || { echo "skipped: only root may build without a user namespace of subuids"; exit 0; }
folder=$(mktemp -d -p "${TMPDIR:-/var/tmp}" elastic-ep-image.XXXXXX)
trap 'rm -rf "$folder"' EXIT
printf '[storage]\ndriver = "vfs"\ngraphroot = "%s"\nrunroot = "%s"\n' "$folder/storage" "$folder/run" > "$folder/storage.conf"
export CONTAINERS_STORAGE_CONF=$folder/storage.conf BUILDAH_FLAGS="--isolation=chroot ${BUILDAH_FLAGS:-}"
if [[ -z ${BASE:-} ]]; then
    BASE=localhost/elastic-ep-base
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$folder/base" > "$folder/log" \
        || { tail "$folder/log" >&2; exit 1; }
    # As Debian's own slim images are: without the packages it was made of, their lists, and what only people read.
    rm -rf "$folder"/base/var/cache/apt/archives/*.deb "$folder"/base/var/lib/apt/lists/* "$folder"/base/usr/share/{doc,man,info,locale}/*
    scratch=$(buildah from scratch)
    buildah add --quiet "$scratch" "$folder/base" / > "$folder/log"
    buildah commit --quiet --rm "$scratch" "$BASE" > "$folder/log"
    rm -rf "$folder/base"
fi
"$here/build.sh" cpu "$BASE" "$folder/elastic-ep.tar"
echo "archive: $(du --apparent-size --block-size=MB "$folder/elastic-ep.tar" | cut -f1)"
container=$(buildah from --quiet "oci-archive:$folder/elastic-ep.tar")
echo "unpacked: $(du --apparent-size --summarize --block-size=MB "$(buildah mount "$container")" | cut -f1)"
inside() { buildah run --isolation=chroot "$container" -- tini -- "$@"; }
inside sh -c '[ "$(id -u)" = 10001 ] && [ "$(id -un)" = elastic ]'
inside elastic --version
inside elastic doctor
inside elastic demo --plain --seconds 2
echo "the image was built and run: its demo held every promise"
