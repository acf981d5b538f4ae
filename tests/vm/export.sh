#!/bin/bash
# export - the whole content out and in again through the verified path, past a bad block too
. tests/vm/lib.sh
size=48M
ui format --data /run/volume --create --size $size --key-file $key
head -c $size /dev/urandom >/run/content
dd if=/dev/zero of=/run/content bs=1M seek=10 count=20 conv=notrunc status=none
step 'import, from a file and from a pipe'
ui import --data /run/volume --key-file $key /run/content
ui export --data /run/volume --key-file $key /run/out1
cmp /run/content /run/out1
ui format --data /run/volume2 --create --size $size --key-file $key
mkfifo /run/pipe
cat /run/content >/run/pipe &
ui import --data /run/volume2 --key-file $key - </run/pipe
ui export --data /run/volume2 --key-file $key - | cmp - /run/content
[ "$(du -m /run/volume2 | cut -f1)" -lt 40 ] || die 'the zeros were written'
step 'never over a file that is there'
refused 5 ui export --data /run/volume --key-file $key /run/out1
step 'never over content that is there'
refused 5 ui import --data /run/volume --key-file $key /run/content
step 'the kernel serves the same bytes'
data=/run/volume
add
cmp -n $((48 * 1048576)) "$disk" /run/content
mark_block "$disk" 40 the-fortieth-block
remove
step 'past a bad block: the rest comes out, exit 6'
flip_bit $data "$(where_is $data the-fortieth-block)"
code=0
ui export --data $data --key-file $key /run/out2 || code=$?
[ $code = 6 ] || die "exit code $code"
cmp -i $((41 * 4096)) /run/content /run/out2
cmp -n $((40 * 4096)) /run/content /run/out2
step 'a key from a pipe'
ui check --data /run/volume2 --key-file - < <(cat $key)
