#!/bin/sh
# arm64_root.sh DIR: an arm64 Debian root with Python and NumPy for user-mode emulation.
#
# A private apt state downloads the packages and dpkg-deb unpacks them; nothing is configured, so
# neither chroot, binfmt_misc nor a container is needed.
set -eu
root=$1
part=$root.part state=$root.apt
rm -rf "$part" "$state"
mkdir -p "$part" "$state/lists/partial" "$state/cache/archives/partial" "$state/dpkg"
: > "$state/dpkg/status"
set -- -o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o "Dir::State=$state" \
  -o "Dir::State::Lists=$state/lists" -o "Dir::State::status=$state/dpkg/status" \
  -o "Dir::Cache=$state/cache" -o APT::Sandbox::User=root -o Debug::NoLocking=1
apt-get "$@" update -qq
apt-get "$@" install -y -qq --download-only --no-install-recommends \
  python3-minimal python3-numpy libstdc++6 libc6 > /dev/null
for package in "$state"/cache/archives/*.deb; do
  dpkg-deb -x "$package" "$part"
done
libraries=$part/usr/lib/aarch64-linux-gnu  # what update-alternatives would have done
ln -sf blas/libblas.so.3 "$libraries/libblas.so.3"
ln -sf lapack/liblapack.so.3 "$libraries/liblapack.so.3"
rm -rf "$state"
mv "$part" "$root"
