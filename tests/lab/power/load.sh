#!/bin/sh
# Lets the process of tests/lab/power/cluster.py begin with its load, and ends when it does.
echo go >/run/power.go
exec tail -f --pid="$(cat /run/power.pid)" /run/power.log
