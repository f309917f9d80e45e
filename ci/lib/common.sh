# Shared by the scripts in ci/. Sourced, never run.
# shellcheck shell=bash

# What a script exits with when the machine lacks something, or when it was called wrongly.
# The numbers are those of ublk-torture, so that a caller needs to know one list only.
# shellcheck disable=SC2034  # used by the scripts that source this file
readonly EXIT_USAGE=1 EXIT_ENVIRONMENT=4

# A script may be started with its output closed. Writing to a file that happens to get the
# free descriptor 1 or 2 would be worse than writing nowhere.
[ -e /proc/self/fd/0 ] || exec 0</dev/null
[ -e /proc/self/fd/1 ] || exec 1>/dev/null
[ -e /proc/self/fd/2 ] || exec 2>/dev/null

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

# die STATUS MESSAGE…
die() {
    local status=$1
    shift
    say "$*"
    exit "$status"
}

# seconds_of DURATION: of 90, 90s, 5m or 1h; fails for anything else, and for nothing at all.
seconds_of() {
    [[ $1 =~ ^([1-9][0-9]{0,6})([smh]?)$ ]] || return 1
    case ${BASH_REMATCH[2]} in
    h) echo $((BASH_REMATCH[1] * 3600)) ;;
    m) echo $((BASH_REMATCH[1] * 60)) ;;
    *) echo "${BASH_REMATCH[1]}" ;;
    esac
}

cache_dir() { printf '%s\n' "${UBLKIT_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/ublkit}"; }

# need_writable_dir DIR: makes DIR, or says why it cannot be used.
need_writable_dir() {
    local dir=$1 error
    if ! error=$(mkdir -p -- "$dir" 2>&1); then
        die "$EXIT_ENVIRONMENT" "cannot make the directory $dir (${error##*: }): set UBLKIT_CACHE to a directory you can write"
    fi
    # A probe file and not `test -w`: root passes that on a read-only file system.
    if ! error=$( (: >"$dir/.write-test.$$") 2>&1); then
        die "$EXIT_ENVIRONMENT" "cannot write to $dir (${error##*: }): set UBLKIT_CACHE to a directory you can write"
    fi
    rm -f -- "$dir/.write-test.$$"
}

# need_free_mib DIR MIB WHAT
need_free_mib() {
    local dir=$1 want=$2 what=$3 free
    free=$(df -Pm -- "$dir" | awk 'NR == 2 { print $4 }')
    if [ "$free" -lt "$want" ]; then
        die "$EXIT_ENVIRONMENT" "$what needs $want MiB in $dir and $free MiB are free: free some space there, or set UBLKIT_CACHE to a directory on a larger disk"
    fi
}

# Debian's name of this machine's architecture.
debian_arch() {
    case $(uname -m) in
    x86_64) echo amd64 ;;
    aarch64) echo arm64 ;;
    *) die "$EXIT_ENVIRONMENT" "no VM for $(uname -m): x86_64 and aarch64 are supported" ;;
    esac
}
