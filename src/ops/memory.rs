//! What the kernels ask of the system's memory: hints, which change no result and may be refused.

use candle_core::{Result, Tensor};

use super::{is_cpu_f32, with_f32};

/// Asks for huge pages under numbers that are read from end to end at every step (weights, the key/value cache): with
/// small ones, each 4 KiB of them costs a walk through the page tables, twice over on a virtual machine.
///
/// Called before the memory is first written, since only then are its pages chosen. Nothing happens where the system
/// has no such hint.
pub(super) fn huge_pages<T>(numbers: &[T]) {
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 4096;
        const HUGE: usize = 2 << 20;
        let start = numbers.as_ptr().addr().next_multiple_of(PAGE);
        let end = numbers.as_ptr_range().end.addr() / PAGE * PAGE;
        let length = end.saturating_sub(start);
        if length >= HUGE {
            let start = numbers.as_ptr().with_addr(start).cast_mut();
            // SAFETY: whole pages inside a slice that is alive; the hint changes what lies under them, not what they hold
            #[allow(unsafe_code, reason = "a system call")]
            unsafe {
                libc::madvise(start.cast(), length, libc::MADV_HUGEPAGE);
            }
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = numbers;
}

/// The same for a tensor's numbers, where they are f32 on the CPU.
///
/// # Errors
/// Those of candle.
pub(crate) fn huge_pages_of(t: &Tensor) -> Result<()> {
    if is_cpu_f32(t) {
        with_f32(t, |numbers| {
            huge_pages(numbers);
            Ok(())
        })?;
    }
    Ok(())
}

/// Asks the allocator to keep what is freed, up to some hundred MiB. By default glibc gives every activation of more than
/// 128 KiB back to the system at once, and each step then takes hundreds of page faults to get them again.
///
/// Process-wide; called once, after the base is loaded, so that what loading freed does go back. Nothing happens with
/// another allocator.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        /// The largest that glibc takes.
        const BY_ITSELF_FROM: i32 = 32 << 20;
        const GIVE_BACK_FROM: i32 = 512 << 20;
        // SAFETY: sets two numbers of the allocator, under its own lock
        #[allow(unsafe_code, reason = "a call into libc")]
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, BY_ITSELF_FROM);
            libc::mallopt(libc::M_TRIM_THRESHOLD, GIVE_BACK_FROM);
        }
    }
}

/// Gives memory that was freed, and kept by [`keep_freed_memory`], back to the system, so that what follows can be measured.
pub fn give_back_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // SAFETY: frees pages of the allocator that nobody uses, under its own locks
        #[allow(unsafe_code, reason = "a call into libc")]
        unsafe {
            libc::malloc_trim(0);
        }
    }
}
