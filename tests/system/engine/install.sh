#!/bin/bash
# Installs what a real container engine needs on Debian 12 or a recent Ubuntu, and nothing that is there already.
# Needs root. Starts nothing: engine.py starts the engine, privately.
set -euo pipefail

if [ "$(id -u)" != 0 ]; then
    echo "install.sh: needs root, to install packages and to run the container engine" >&2
    exit 1
fi

have() { command -v "$1" >/dev/null 2>&1; }

packages=()
# A machine with Docker's own packages has dockerd already; docker.io would conflict with them.
have dockerd || packages+=(docker.io)
have docker || [[ " ${packages[*]} " == *" docker.io "* ]] || packages+=(docker.io)
have iptables || packages+=(iptables)
have mmdebstrap || packages+=(mmdebstrap)
[ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || packages+=(debian-archive-keyring)
[ -e /etc/ssl/certs/ca-certificates.crt ] || packages+=(ca-certificates)
python3 -c 'import ensurepip, venv' 2>/dev/null || packages+=(python3-venv)
[ "${#packages[@]}" -gt 0 ] || exit 0

echo "install.sh: installing ${packages[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
# docker.io's postinst would start a system-wide engine where an init system runs; this one is private.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
fi
apt-get -qq -o DPkg::Lock::Timeout=300 update </dev/null >&2
apt-get -qq -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "${packages[@]}" </dev/null >&2
