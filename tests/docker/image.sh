#!/bin/bash
# Builds an image and runs it without a Docker engine and without a registry of images: buildah on a stand-in base that
# debootstrap makes from this machine's package mirror, under the name that FROM asks for. Needs root, and
#   apt-get install -y --no-install-recommends buildah debootstrap
#   image.sh base STORE NAME...                          the stand-in base, under these names
#   image.sh build STORE CONTEXT IMAGE [options of buildah build]
#   image.sh run STORE IMAGE [arguments of the entry point]     as process 1 of a namespace, as the image's user
#   image.sh shell STORE IMAGE COMMAND                   the same, another command instead of the entry point
#   image.sh down STORE
# WHEELS: a folder in which pip looks for wheels first.
set -euo pipefail
verb=$1 store=$(mkdir -p "$2" && cd "$2" && pwd)
shift 2
buildah() { command buildah --root "$store/images" --runroot "$store/run" --storage-driver "${DRIVER:-overlay}" "$@"; }
authorities=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}

base() {
  local mirror container name
  if [ ! -e "$store/base/.done" ]; then
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | head -n 1)
    debootstrap --variant=minbase bookworm "$store/base" "$mirror" > "$store/debootstrap.log"
    cp -a /etc/apt/sources.list* /etc/apt/apt.conf.d "$store/base/etc/apt/"
    touch "$store/base/.done"
  fi
  container=$(buildah from scratch)
  buildah copy -q "$container" "$store/base" / > /dev/null
  buildah config --cmd /bin/bash --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
  for name in "$@"; do buildah commit -q "$container" "$name" > /dev/null; done
  buildah rm "$container" > /dev/null
}

build() { # the authorities of this machine's proxy and its wheels are mounted: such an image is not for publishing
  local context=$1 image=$2
  shift 2
  local lent=(-v "$authorities:/run/authorities.pem:ro" --env PIP_CERT=/run/authorities.pem)
  [ -z "${WHEELS:-}" ] || lent+=(-v "$WHEELS:/run/wheels:ro" --env PIP_FIND_LINKS=/run/wheels)
  buildah build --layers --format docker --pull=never --isolation chroot --network host "${lent[@]}" \
    -f "$context/docker/Dockerfile" -t "$image" "$@" "$context"
}

of_image() { buildah inspect --type image --format "$1" "$image"; }

run() {
  local image=$1 words
  readarray -t words < <(of_image '{{range .Docker.Config.Entrypoint}}{{println .}}{{end}}' | sed '/^$/d')
  inside "$image" "${words[@]}" "${@:2}"
}

inside() { # a namespace whose process 1 is the command
  local image=$1 root variables # `container` outlives the function: the trap takes it away
  shift
  container=$(buildah from --pull=never "$image")
  root=$(buildah mount "$container")
  readarray -t variables < <(of_image '{{range .Docker.Config.Env}}{{println .}}{{end}}' | sed '/^$/d')
  local script='mount -t proc proc "$1/proc"; mount --rbind /dev "$1/dev"; shift; exec "$@"'
  local to=(chroot --userspec="$(of_image '{{.Docker.Config.User}}')" "$root" env -i "--chdir=$(of_image '{{.Docker.Config.WorkingDir}}')" "${variables[@]}")
  trap 'buildah rm "$container" > /dev/null' EXIT
  unshare --pid --mount --fork --kill-child bash -c "$script" - "$root" "${to[@]}" "$@" &
  local child=$! code=0
  trap 'pkill -TERM -P "$child" || true' TERM # what a Docker engine tells process 1
  wait "$child" || code=$?
  while kill -0 "$child" 2> /dev/null; do code=0; wait "$child" || code=$?; done
  return "$code"
}

case $verb in
  base | build | run) "$verb" "$@" ;;
  shell) inside "$1" bash -c "$2" ;;
  down)
    buildah rm -a > /dev/null 2>&1 || true
    buildah rmi -a -f > /dev/null 2>&1 || true
    rm -rf "$store" ;;
  *) sed -n '2,12p' "$0" >&2; exit 2 ;;
esac
