#!/usr/bin/env bash
# Builds the chart's image with buildah, without a daemon and without privileges where the system has subuids.
#
#   helm/image/build.sh cpu  NAME@sha256:DIGEST OUTPUT     # an OCI archive, for `skopeo copy oci-archive:OUTPUT docker://…`
#   helm/image/build.sh cuda NAME@sha256:DIGEST OUTPUT
#
# The base: one of Debian with Python 3.11 or later. TORCH: the build of torch that you want, by default the one that your
# index has; pip's variables that say which index that is, and whose certificate it has, are passed on, with the files that
# they name. BUILDAH_FLAGS: such as --isolation=chroot.
set -euo pipefail
variant=${1:?cpu or cuda} base=${2:?the base image, by its digest} output=${3:?where to write the OCI archive}
[[ $variant == cpu || $variant == cuda ]] || { echo "no variant $variant: cpu or cuda" >&2; exit 2; }
[[ $base == *@sha256:* || $base == localhost/* ]] || { echo "$base is not named by its digest (@sha256:…)" >&2; exit 2; }
source=$(cd "$(dirname "$0")/../.." && pwd)
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$source/pyproject.toml")
extras=embedded
[[ $variant == cuda ]] && extras=embedded,cuda
arguments=(--build-arg "BASE=$base" --build-arg "VARIANT=$variant" --build-arg "EXTRAS=$extras")
for name in TORCH PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_CERT; do
    value=${!name:-}
    [[ -n $value ]] || continue
    if [[ $value == /* && -e $value ]]; then  # at a place of its own: apt-get replaces the image's certificates
        place=/handed-on/$name/$(basename "$value")
        arguments+=(--volume "$value:$place:ro")
        value=$place
    fi
    arguments+=(--build-arg "$name=$value")
done
buildah build --file "$source/helm/image/Dockerfile" --ignorefile "$source/helm/image/Dockerfile.dockerignore" \
    "${arguments[@]}" ${BUILDAH_FLAGS:-} \
    --label "org.opencontainers.image.version=$version" --tag "elastic-ep:$version-$variant" "$source"
buildah push "elastic-ep:$version-$variant" "oci-archive:$output:elastic-ep:$version-$variant"
