//! Gives each processor of a guest the same speed: an instruction takes a nanosecond of the guest's
//! time, whatever it takes to emulate. qemu's own clock that counts instructions (`-icount`) has
//! one processor run at a time; here they run side by side, as a machine's do. The rounds of
//! SHA-256 may take what they take on a processor that has instructions for them (`PACE_SHA`): far
//! less, and less for each of two hashes side by side.
//!
//! It is loaded twice (`scripts/vm -P`). As a plugin of qemu (its manual, "QEMU TCG Plugins") it
//! holds each processor back to an instruction in `PACE` nanoseconds of the host. By `LD_PRELOAD`
//! it gives qemu a clock that runs `PACE` times as slowly, so that timers, sleeps and a drive's
//! latency keep their relation to instructions. A flush of one of qemu's disks takes as long as
//! `PACE_FLUSH` says. Where the emulator is slower than that for longer
//! than `CATCH_UP`, instructions take longer; how much is said at the end.

use libc::{c_char, c_int, c_long, c_uint, c_void, pollfd, sigset_t, timespec};
use std::{
    cell::Cell,
    ptr::null_mut,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

/// The guest's nanoseconds between two looks at the clock.
const QUANTUM: u64 = 1000;
/// In which they are counted.
const THOUSANDTHS: u64 = 1000;
/// How many nanoseconds of the host a processor may be late and still make up for: over as many,
/// fast instructions pay for slow ones.
const CATCH_UP: u64 = 2_000_000;
const SECOND: u64 = 1_000_000_000;

/// `qemu_plugin_u64`: a number of each processor's.
#[repr(C)]
#[derive(Clone, Copy)]
struct Counter {
    scoreboard: *mut c_void,
    offset: usize,
}
// SAFETY: qemu's to be used from the thread of any processor; we only hand the pointer back to it.
unsafe impl Send for Counter {}
// SAFETY: as above.
unsafe impl Sync for Counter {}

/// `QEMU_PLUGIN_INLINE_ADD_U64`.
const ADD: c_int = 0;
/// `QEMU_PLUGIN_CB_NO_REGS`.
const NO_REGISTERS: c_int = 0;
/// `QEMU_PLUGIN_COND_GE`.
const AT_LEAST: c_int = 7;

// qemu-plugin.h, version 3.
unsafe extern "C" {
    fn qemu_plugin_scoreboard_new(bytes: usize) -> *mut c_void;
    fn qemu_plugin_u64_get(counter: Counter, processor: c_uint) -> u64;
    fn qemu_plugin_u64_set(counter: Counter, processor: c_uint, value: u64);
    fn qemu_plugin_tb_n_insns(block: *const c_void) -> usize;
    fn qemu_plugin_tb_get_insn(block: *const c_void, which: usize) -> *mut c_void;
    fn qemu_plugin_insn_data(instruction: *const c_void, to: *mut c_void, most: usize) -> usize;
    fn qemu_plugin_register_vcpu_tb_trans_cb(id: u64, call: extern "C" fn(u64, *mut c_void));
    fn qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(block: *mut c_void, op: c_int, counter: Counter, by: u64);
    fn qemu_plugin_register_vcpu_tb_exec_cond_cb(
        block: *mut c_void,
        call: extern "C" fn(c_uint, *mut c_void),
        flags: c_int,
        condition: c_int,
        counter: Counter,
        than: u64,
        data: *mut c_void,
    );
    fn qemu_plugin_register_vcpu_resume_cb(id: u64, call: extern "C" fn(u64, c_uint));
    fn qemu_plugin_register_atexit_cb(id: u64, call: extern "C" fn(u64, *mut c_void), data: *mut c_void);
}

/// The version of qemu's interface that this was written for.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals)]
pub static qemu_plugin_version: c_int = 3;

/// Thousandths of a nanosecond of the guest that a processor has taken since the last look.
static SINCE: OnceLock<Counter> = OnceLock::new();
/// The guest's nanoseconds that all processors have taken.
static TAKEN: AtomicU64 = AtomicU64::new(0);
/// Nanoseconds of the host that instructions took too long.
static LATE: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// When what this processor has run is paid for. Each has a thread of its own.
    static PAID: Cell<u64> = const { Cell::new(0) };
}

/// Nanoseconds of the host for one of the guest.
fn pace() -> u64 {
    static PACE: OnceLock<u64> = OnceLock::new();
    *PACE.get_or_init(|| std::env::var("PACE").ok().and_then(|p| p.parse().ok()).unwrap_or(1).max(1))
}

/// Nanoseconds of the host's clock; not by the function of that name, which is ours below.
fn now() -> u64 {
    let mut time = timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes a timespec to where one is.
    unsafe { libc::syscall(libc::SYS_clock_gettime, libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * SECOND + time.tv_nsec as u64
}

fn to_timespec(ns: u64) -> timespec {
    timespec { tv_sec: (ns / SECOND) as i64, tv_nsec: (ns % SECOND) as i64 }
}

/// `PACE_SHA`: thousandths of a nanosecond for two rounds of SHA-256, of one hash alone and of each
/// of several side by side. Without, as for any instruction.
fn sha_pace() -> Option<[u64; 2]> {
    static SHA_PACE: OnceLock<Option<[u64; 2]>> = OnceLock::new();
    *SHA_PACE.get_or_init(|| {
        let text = std::env::var("PACE_SHA").ok()?;
        let numbers = text.split_once(' ').and_then(|(one, each)| Some([one.parse().ok()?, each.parse().ok()?]));
        // A panic ends qemu: what calls this can't unwind.
        Some(numbers.unwrap_or_else(|| panic!("PACE_SHA='{text}': two whole numbers are wanted, as in '1410 725'")))
    })
}

/// The register that an instruction changes which is `sha256rnds2` (Intel's manual,
/// volume 2: 0F 38 CB /r).
fn rounds_on(code: &[u8]) -> Option<u8> {
    let (rex, code) = match code {
        [rex @ 0x40..=0x4f, rest @ ..] => (*rex, rest),
        _ => (0, code),
    };
    match code {
        [0x0f, 0x38, 0xcb, registers, ..] => Some((registers >> 3 & 7) | (rex << 1 & 8)),
        _ => None,
    }
}

/// Thousandths of a nanosecond that a piece of code without jumps takes. The rounds are all
/// that counts where there are any: what else is there goes beside them. One hash changes
/// two registers in turn.
///
/// # Safety
/// The block is qemu's, and valid.
unsafe fn cost(block: *const c_void) -> u64 {
    const LONGEST: usize = 15;
    // SAFETY: the caller's.
    let instructions = unsafe { qemu_plugin_tb_n_insns(block) };
    let (mut rounds, mut registers) = (0, 0_u16);
    for which in 0..instructions {
        let mut code = [0; LONGEST];
        // SAFETY: the caller's; qemu writes at most as many bytes as there are.
        let bytes =
            unsafe { qemu_plugin_insn_data(qemu_plugin_tb_get_insn(block, which), code.as_mut_ptr().cast(), LONGEST) };
        if let Some(register) = rounds_on(&code[..bytes.min(LONGEST)]) {
            rounds += 1;
            registers |= 1 << register;
        }
    }
    match sha_pace() {
        Some([alone, beside]) if rounds > 0 => rounds * if registers.count_ones() > 2 { beside } else { alone },
        _ => instructions as u64 * THOUSANDTHS,
    }
}

extern "C" fn translated(_: u64, block: *mut c_void) {
    let (since, quantum) = (*SINCE.get().expect("set before"), QUANTUM * THOUSANDTHS);
    // SAFETY: qemu's block, valid during this call; the function registered is of the type asked for.
    unsafe {
        qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(block, ADD, since, cost(block));
        qemu_plugin_register_vcpu_tb_exec_cond_cb(block, hold_back, NO_REGISTERS, AT_LEAST, since, quantum, null_mut());
    }
}

extern "C" fn hold_back(processor: c_uint, _: *mut c_void) {
    let since = *SINCE.get().expect("set before");
    // SAFETY: the scoreboard lives as long as qemu, and has a place for each of its processors.
    let taken = unsafe {
        let taken = qemu_plugin_u64_get(since, processor);
        qemu_plugin_u64_set(since, processor, taken % THOUSANDTHS);
        taken / THOUSANDTHS
    };
    TAKEN.fetch_add(taken, Relaxed);
    let (paid, mut time) = (PAID.get() + taken * pace(), now());
    let late = time.saturating_sub(paid + CATCH_UP);
    LATE.fetch_add(late, Relaxed);
    PAID.set(paid + late);
    // A sleep would be longer than most waits are.
    while time < paid {
        std::hint::spin_loop();
        time = now();
    }
}

/// Nobody makes up for being idle.
extern "C" fn resumed(_: u64, _: c_uint) {
    PAID.set(PAID.get().max(now()));
}

extern "C" fn ended(_: u64, _: *mut c_void) {
    let (taken, late) = (TAKEN.load(Relaxed), LATE.load(Relaxed));
    let percent = late as f64 * 100.0 / (taken * pace()).max(1) as f64;
    eprintln!(
        "pace: {taken} ns of the guest's processors, {pace} ns of the host's each; {percent:.2} % too slow",
        pace = pace()
    );
}

/// What qemu calls first.
#[unsafe(no_mangle)]
pub extern "C" fn qemu_plugin_install(id: u64, _: *const c_void, _: c_int, _: *const *const c_char) -> c_int {
    // SAFETY: as qemu's manual has it, with functions of the types asked for.
    unsafe {
        let _ = SINCE.set(Counter { scoreboard: qemu_plugin_scoreboard_new(size_of::<u64>()), offset: 0 });
        qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
        qemu_plugin_register_vcpu_resume_cb(id, resumed);
        qemu_plugin_register_atexit_cb(id, ended, null_mut());
    }
    0
}

/// The monotonic clock `PACE` times as slow, all others as they are.
///
/// # Safety
/// As clock_gettime(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: c_int, time: *mut timespec) -> c_int {
    static BEGIN: OnceLock<u64> = OnceLock::new();
    if clock != libc::CLOCK_MONOTONIC {
        // SAFETY: the caller's.
        return unsafe { libc::syscall(libc::SYS_clock_gettime, clock as c_long, time) } as c_int;
    }
    let begin = *BEGIN.get_or_init(now);
    // SAFETY: the caller's.
    unsafe { *time = to_timespec(begin + (now() - begin) / pace()) };
    0
}

/// Waits `PACE` times as long: how qemu waits for its next timer.
///
/// # Safety
/// As ppoll(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ppoll(files: *mut pollfd, count: u64, limit: *const timespec, mask: *const sigset_t) -> c_int {
    /// Bytes of the kernel's sigset_t.
    const MASK: usize = 8;
    // SAFETY: null or the caller's.
    let slow = unsafe { limit.as_ref() }
        .map(|t| to_timespec((t.tv_sec as u64 * SECOND + t.tv_nsec as u64).saturating_mul(pace())));
    let slow = slow.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the caller's, and a timespec that lives until the end.
    unsafe { libc::syscall(libc::SYS_ppoll, files, count, slow, mask, MASK) as c_int }
}

/// Takes `PACE_FLUSH` nanoseconds of the guest's more: how qemu flushes a disk. The file is in
/// memory, and would take none.
///
/// # Safety
/// As fdatasync(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fdatasync(file: c_int) -> c_int {
    static TAKES: OnceLock<u64> = OnceLock::new();
    let takes = *TAKES.get_or_init(|| std::env::var("PACE_FLUSH").ok().and_then(|ns| ns.parse().ok()).unwrap_or(0));
    std::thread::sleep(std::time::Duration::from_nanos(takes.saturating_mul(pace())));
    // SAFETY: the caller's.
    unsafe { libc::syscall(libc::SYS_fdatasync, file) as c_int }
}
