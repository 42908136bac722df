//! Registry: alias -> immutable version -> lease.
