#!/bin/bash
# crash-sqlite - reset and power cut under a database: every committed transaction is there
# vm: boots=3
. tests/vm/lib-crash.sh
make() {
  local mode
  for mode in delete wal; do
    sqlite3 "/mnt/t/$mode.db" "pragma journal_mode=$mode; create table t (boot, n, filler);" >/dev/null
  done
}
committer() { # MODE
  python3 - "$1" "$boot" <<'P'
import os, sqlite3, sys
mode, boot = sys.argv[1], int(sys.argv[2])
db = sqlite3.connect(f"/mnt/t/{mode}.db", isolation_level=None)
db.execute("pragma synchronous=extra")
with open(f"/out/committed.{mode}", "a") as out:
    for n in range(1_000_000):
        db.execute("begin")
        for _ in range(1 + n % 5):
            db.execute("insert into t values (?, ?, ?)", (boot, n, os.urandom(n * 37 % 9000)))
        db.execute("commit")
        out.write(f"{boot} {n}\n")
        out.flush()
P
}
load() { committer delete & committer wal & wait; }
enough() { committed delete && committed wal; }
committed() { # MODE
  local n
  n=$(grep -cs "^$boot " "/out/committed.$1")
  [ "${n:-0}" -ge 25 ]
}
verify() {
  local mode
  for mode in delete wal; do
    [ "$(sqlite3 "/mnt/t/$mode.db" 'pragma integrity_check')" = ok ] || die "$mode.db is damaged"
    sqlite3 -separator ' ' "/mnt/t/$mode.db" 'select boot, n, count(*) from t group by boot, n' >/run/there
    python3 - "$mode" "$boot" <<'P'
import sys
mode, boots = sys.argv[1], range(1, int(sys.argv[2]))
there = {tuple(map(int, line.split()[:2])): int(line.split()[2]) for line in open("/run/there")}
committed = [tuple(map(int, l.split())) for l in open(f"/out/committed.{mode}") if l.endswith("\n")]
for boot, n in committed:
    if there.get((boot, n)) != 1 + n % 5:
        sys.exit(f"{mode}: transaction {boot} {n} was committed, and {there.get((boot, n))} of its rows are there")
if idle := set(boots) - {boot for boot, _ in committed}:
    sys.exit(f"{mode}: nothing was committed in boot {idle}")
print(f"{mode}: all {len(committed)} committed transactions are there")
P
  done
}
crash_test 3
