//! Panics as errors: one of a computation is the failure of who asked for it, not the engine thread's end.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs something; its panic as text.
pub(super) fn caught<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        format!("panic: {}", text.unwrap_or("of unknown kind"))
    })
}

/// Runs a computation; its error or panic as text.
pub(super) fn computed<T>(compute: impl FnOnce() -> candle_core::Result<T>) -> Result<T, String> {
    caught(compute)?.map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::computed;

    #[test]
    fn a_panic_is_an_error_also_across_the_thread_pool() {
        let device = candle_core::Device::Cpu;
        let outcome = computed(|| device.with_context(|| -> candle_core::Result<()> { panic!("row {}", 3) }));
        assert_eq!(outcome, Err("panic: row 3".into()));
        assert_eq!(computed(|| device.with_context(|| Ok(1))), Ok(1), "the pool goes on");
        // with RUST_BACKTRACE set, the library appends a backtrace
        let refused = computed(|| -> candle_core::Result<()> { candle_core::bail!("no") });
        assert!(refused.is_err_and(|e| e.starts_with("no")));
    }
}
