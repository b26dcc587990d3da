# Shared by the scripts (source it): installs what is missing on a fresh Debian 12 or 13.
# shellcheck shell=bash

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$checkout/.venv

die() {
    printf '%s\n' "$*" >&2
    exit 1
}

# with_progress TEXT COMMAND...: runs COMMAND with its output kept aside; shows TEXT and the time
# that has gone by, on one line of a terminal or as a line every few seconds; shows the output
# only if COMMAND fails.
with_progress() {
    local text=$1 log pid status=0 began=$SECONDS
    shift
    log=$(mktemp)
    "$@" >"$log" 2>&1 </dev/null &
    pid=$!
    # An interrupted script must not leave an install behind.
    trap 'kill "$pid" 2>/dev/null; wait "$pid" 2>/dev/null; rm -f "$log"; exit 130' INT TERM
    while kill -0 "$pid" 2>/dev/null; do
        if [[ -t 2 ]]; then
            printf '\r%s ... %d s ' "$text" $((SECONDS - began)) >&2
        elif (((SECONDS - began) % 5 == 1)); then
            printf '%s ... %d s\n' "$text" $((SECONDS - began)) >&2
        fi
        sleep 1
    done
    wait "$pid" || status=$?
    trap - INT TERM
    if [[ -t 2 ]]; then
        printf '\r%s: %d s        \n' "$text" $((SECONDS - began)) >&2
    fi
    if ((status != 0)); then
        tail -n 40 "$log" >&2
        rm -f "$log"
        die "$text failed with exit code $status; the end of its output is above"
    fi
    rm -f "$log"
}

java_is_good() {
    local version
    version=$(java -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p;q') || return 1
    [[ -n $version ]] && ((version >= 17))
}

apt_install() {
    local sudo=()
    if ((EUID != 0)); then
        command -v sudo >/dev/null || die "missing Debian packages: $*; install them as root"
        sudo=(sudo)
    fi
    local install=("${sudo[@]}" env DEBIAN_FRONTEND=noninteractive
        apt-get install --yes --no-install-recommends "$@")
    if ! "${install[@]}"; then
        "${sudo[@]}" apt-get update
        "${install[@]}"
    fi
}

install_debian_packages() {
    local package missing=()
    for package in fuse3 libfuse3-dev pkg-config gcc libc6-dev python3-dev python3-venv \
        libpmem1 libpmemobj1; do
        dpkg-query --show --showformat='${Status}\n' "$package" 2>/dev/null |
            grep -q ' installed$' || missing+=("$package")
    done
    # 17 on Debian 12, 21 on Debian 13: both run Spark 4.
    java_is_good || missing+=(default-jre-headless)
    ((${#missing[@]} == 0)) && return
    if ((EUID != 0)); then
        sudo -v || die "missing Debian packages: ${missing[*]}; install them as root"
    fi
    with_progress "installing ${missing[*]}" apt_install "${missing[@]}"
}

install_python_packages() {
    local python=/usr/bin/python3 version stamp
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    case $version in
        3.11 | 3.12 | 3.13) ;;
        *) die "$python is Python $version; CrailFS runs on 3.11 to 3.13" ;;
    esac
    stamp=$(cat "$checkout"/requirements-build.lock "$checkout"/requirements.lock \
        "$checkout"/pyproject.toml <(echo "$checkout $version") | sha256sum)
    [[ $(cat "$venv/bootstrap.stamp" 2>/dev/null) == "$stamp" ]] && return
    if ! "$venv/bin/python" -c "import sys; assert '%d.%d' % sys.version_info[:2] == '$version'" \
        2>/dev/null; then
        with_progress "making $venv" "$python" -m venv --clear "$venv"
    fi
    local pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input install)
    # Without build isolation: what builds the source distributions is locked as well.
    local locked=("${pip[@]}" --require-hashes --no-build-isolation --use-pep517 -r)
    with_progress "installing build tools" "${locked[@]}" "$checkout/requirements-build.lock"
    with_progress "installing Python packages" "${locked[@]}" "$checkout/requirements.lock"
    with_progress "installing crailfs" \
        "${pip[@]}" --no-deps --no-build-isolation --editable "$checkout"
    printf '%s\n' "$stamp" >"$venv/bootstrap.stamp"
}

# pyverbs (RDMA) fits the distribution's own libibverbs only: the environment gets the distribution's.
link_pyverbs() {
    local packages=/usr/lib/python3/dist-packages site
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    if [[ -d $packages/pyverbs ]]; then
        ln -sfn "$packages/pyverbs" "$site/pyverbs"
    elif [[ -L $site/pyverbs ]]; then
        rm "$site/pyverbs"
    fi
}

bootstrap() {
    install_debian_packages
    [[ -e /dev/fuse ]] || die "/dev/fuse does not exist: load the kernel's fuse module (modprobe fuse)"
    install_python_packages
    link_pyverbs
}
