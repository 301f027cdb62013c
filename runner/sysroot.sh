#!/bin/sh
# sysroot.sh DEBIAN_ARCH DIR: the runner's libraries for another architecture, out of Debian packages.
#
# Downloads libpcre2-dev, libutf8proc-dev (static libraries) and nlohmann-json3-dev with a private
# apt state, so neither root nor `dpkg --add-architecture` is needed, and unpacks them into DIR.
set -eu
arch=$1 dir=$2
state=$(mktemp -d)
trap 'rm -rf "$state"' EXIT
mkdir -p "$state/lists/partial" "$state/cache/archives/partial" "$state/dpkg" "$dir"
: > "$state/dpkg/status"
set -- -o "APT::Architecture=$arch" -o "APT::Architectures::=$arch" -o "Dir::State=$state" \
  -o "Dir::State::Lists=$state/lists" -o "Dir::State::status=$state/dpkg/status" \
  -o "Dir::Cache=$state/cache" -o APT::Sandbox::User=root -o Debug::NoLocking=1
apt-get "$@" update -qq
(cd "$state" && apt-get "$@" download -qq libpcre2-dev libutf8proc-dev nlohmann-json3-dev)
for package in "$state"/*.deb; do
  dpkg-deb -x "$package" "$dir"
done
