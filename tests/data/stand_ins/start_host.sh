#!/usr/bin/env bash
# In namespaces of its own: the name, the names of the others, shared memory; then sshd until it is ended.
set -e
hostname "$1"
mount --bind "$2" /etc/hosts
mount -t tmpfs -o size=4g tmpfs /dev/shm
exec "$(command -v sshd)" -D -e -f "$3"
