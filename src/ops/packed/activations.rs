//! What activations are rounded to before they are multiplied with a frozen matrix.

use std::cell::Cell;

/// Precision of activations in products with frozen matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Activations {
    /// None is lost.
    #[default]
    F32,
    /// Rounded to bf16 where the matrix is kept in bf16 and the machine multiplies pairs of them (AVX512-BF16); elsewhere f32.
    Bf16,
}

thread_local! {
    static ACTIVATIONS: Cell<Activations> = const { Cell::new(Activations::F32) };
}

/// Gives the ops that `f` calls on this thread activations of this precision; without it they have f32. It is for passes of
/// serving, whose rows then all get the same, however many they are.
pub fn with_activations<T>(activations: Activations, f: impl FnOnce() -> T) -> T {
    /// Sets it back when it is dropped.
    struct Back(Activations);
    impl Drop for Back {
        fn drop(&mut self) {
            ACTIVATIONS.set(self.0);
        }
    }
    let _back = Back(ACTIVATIONS.replace(activations));
    f()
}

/// What the ops of this thread have.
pub(super) fn activations() -> Activations {
    ACTIVATIONS.get()
}
