#!/bin/bash
# Debian's part of the cluster: etcd, containerd, runc, CNI plugins, nftables. Needs root; starts nothing.
set -euo pipefail
packages=()
for one in etcd:etcd-server containerd:containerd runc:runc conntrack:conntrack socat:socat nft:nftables openssl:openssl curl:curl; do
    command -v "${one%%:*}" >/dev/null || packages+=("${one##*:}")
done
[ -e /usr/lib/cni/bridge ] || packages+=(containernetworking-plugins)
[ "${#packages[@]}" -gt 0 ] || exit 0
export DEBIAN_FRONTEND=noninteractive
apt-get -qq -o DPkg::Lock::Timeout=300 update </dev/null >&2
apt-get -qq -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "${packages[@]}" </dev/null >&2
