//! The allocator, which `main.rs` installs: large allocations get pages of their own, huge ones
//! where the kernel has them.
//!
//! Those that stay are taken at start: the requests' buffers, the cache, the pending tags. In huge
//! pages the processor finds their addresses without walking page tables, and the kernel sees one
//! piece of memory in a request of 1 MiB, not 256. Nothing depends on it: where there are none, the
//! same memory is made of small ones. For a daemon (`PR_SET_IO_FLUSHER`) the kernel makes none by
//! moving others' memory about, so on a machine that has run for long it may get few.

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, mprotect, munmap};
use std::{
    alloc::{GlobalAlloc, Layout, System},
    ffi::c_void,
    num::NonZeroUsize,
    ptr::{self, NonNull},
};

/// A huge page, of x86-64 and of aarch64 with pages of 4 KiB. Where it is another size, such memory
/// only has no use of it.
const HUGE: usize = 2 << 20;
/// The largest of the usual pages that Linux is built with: what is mapped and unmapped is a
/// multiple of it.
const PAGE: usize = 64 << 10;

/// The system's allocator, but for what is large.
pub struct LargeApart;

fn is_large(layout: Layout) -> bool {
    layout.size() >= HUGE && layout.align() <= HUGE
}

// SAFETY: what is small is the system allocator's in every call, what is large is mapped here and
// nowhere else; which it is follows from the layout, which is the same when memory is given back.
unsafe impl GlobalAlloc for LargeApart {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match is_large(layout) {
            true => map(layout.size()),
            // SAFETY: the caller keeps `alloc`'s contract.
            false => unsafe { System.alloc(layout) },
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        match is_large(layout) {
            // Fresh pages are zeros.
            true => map(layout.size()),
            // SAFETY: the caller keeps `alloc_zeroed`'s contract.
            false => unsafe { System.alloc_zeroed(layout) },
        }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        match is_large(layout) {
            // SAFETY: a mapping that `map` made for so many bytes, and that nobody uses any more.
            true => unsafe { unmap(place, layout.size().next_multiple_of(PAGE)) },
            // SAFETY: `place` came from `System`, for this layout.
            false => unsafe { System.dealloc(place, layout) },
        }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller vouches for the size, and the alignment is that of a layout.
        let wanted = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        if !is_large(layout) && !is_large(wanted) {
            // SAFETY: `place` came from `System`, and the caller keeps `realloc`'s contract.
            return unsafe { System.realloc(place, layout, size) };
        }
        // SAFETY: the two places are different allocations, each at least as large as what is
        // copied; the old one is not used any more.
        unsafe {
            let new = self.alloc(wanted);
            if !new.is_null() {
                ptr::copy_nonoverlapping(place, new, layout.size().min(size));
                self.dealloc(place, layout);
            }
            new
        }
    }
}

/// Maps `size` bytes of zeros on a boundary of [`HUGE`]; null where there is no memory.
///
/// The memory is accessible only when the kernel has been advised: locked memory (`mlockall(2)`) is
/// filled with pages in the moment in which it can be.
fn map(size: usize) -> *mut u8 {
    let Some(len) = size.checked_next_multiple_of(PAGE) else { return ptr::null_mut() };
    let Some(reserved) = len.checked_add(HUGE).and_then(NonZeroUsize::new) else { return ptr::null_mut() };
    // SAFETY: new memory, at an address that the kernel chooses.
    let mapped = unsafe { mmap_anonymous(None, reserved, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE) };
    let Ok(mapped) = mapped else { return ptr::null_mut() };
    let begin = mapped.as_ptr().cast::<u8>();
    let before = begin.align_offset(HUGE);
    // SAFETY: all of it lies in the mapping, which is ours alone; what is cut off at
    // both ends is not used.
    unsafe {
        let place = begin.add(before);
        unmap(begin, before);
        unmap(place.add(len), HUGE - before);
        let memory = NonNull::new_unchecked(place.cast::<c_void>());
        // A kernel without huge pages refuses: then it has small ones.
        let _ = madvise(memory, len, MmapAdvise::MADV_HUGEPAGE);
        if mprotect(memory, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE).is_err() {
            unmap(place, len);
            return ptr::null_mut();
        }
        place
    }
}

/// # Safety
/// `len` bytes at `place`, whole pages, are mapped and nobody uses them.
unsafe fn unmap(place: *mut u8, len: usize) {
    if let Some(place) = NonNull::new(place.cast::<c_void>()).filter(|_| len > 0) {
        // SAFETY: the caller's word. Where the kernel can't split a mapping, the memory stays:
        // nothing is wrong but that.
        let _ = unsafe { munmap(place, len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The flags of the mapping that an address lies in (`VmFlags` in proc_pid_smaps(5)).
    fn flags(address: usize) -> String {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let begins_with_it = |line: &&str| {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            let number = |text| usize::from_str_radix(text, 16).ok();
            let range = range.and_then(|(begin, end)| Some(number(begin)?..number(end)?));
            range.is_some_and(|range| range.contains(&address))
        };
        let mut lines = maps.lines().skip_while(|line| !begins_with_it(line));
        lines.find_map(|line| line.strip_prefix("VmFlags: ")).unwrap().to_owned()
    }

    /// Bytes mapped (`VmSize` in proc_pid_status(5)).
    fn mapped() -> usize {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        statm.split(' ').next().unwrap().parse::<usize>().unwrap() * 4096
    }

    #[test]
    fn large_memory_is_aligned_zeroed_and_the_kernel_knows_what_for() {
        let kernel_has_huge_pages = std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists();
        for size in [HUGE, HUGE + 1, 3 * HUGE - 4096] {
            let memory = vec![0u8; size];
            let begin = memory.as_ptr() as usize;
            assert_eq!(begin % HUGE, 0);
            assert!(memory.iter().all(|&byte| byte == 0));
            assert_eq!(flags(begin).split(' ').any(|flag| flag == "hg"), kernel_has_huge_pages);
        }
    }

    #[test]
    fn it_goes_whole() {
        let before = mapped();
        (0..1000).for_each(|_| drop(vec![0u8; HUGE + 1]));
        // Other tests have their own; what stays each time would be 2 MiB.
        assert!(mapped() < before + 1000 * HUGE / 2);
    }

    #[test]
    fn growing_and_shrinking_keeps_what_is_there() {
        let byte = |i: usize| (i % 251) as u8;
        let mut memory: Vec<u8> = Vec::with_capacity(1000);
        for size in [1000, HUGE - 1, HUGE, 3 * HUGE] {
            memory.reserve_exact(size - memory.len());
            memory.extend((memory.len()..size).map(byte));
        }
        assert_eq!(memory.as_ptr() as usize % HUGE, 0);
        for size in [2 * HUGE, HUGE + 5, 77] {
            memory.truncate(size);
            memory.shrink_to_fit();
            assert!(memory.iter().enumerate().all(|(i, &b)| b == byte(i)), "{size} bytes");
        }
    }

    #[test]
    fn too_much_is_refused() {
        assert!(Vec::<u8>::new().try_reserve_exact(1 << 60).is_err());
        assert!(Vec::<u8>::new().try_reserve_exact(isize::MAX as usize - 3).is_err());
    }
}
