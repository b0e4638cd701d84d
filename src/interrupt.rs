//! Stopping what runs from outside: a flag that everything long asks for, between pieces that are short.
//!
//! The library installs no signal handler; a front end (the Jupyter kernel, a program's own handler) calls [`interrupt`].
//! Training stops between two micro-steps, text between two tokens; loading, quantizing, merging, evaluating and
//! downloading end with an error, and nothing half-done is left under a final name.

use std::sync::atomic::{AtomicU8, Ordering};

use crate::{Error, Result};

/// Nobody asked.
const NONE: u8 = 0;
/// Stops what runs now.
const ONCE: u8 = 1;
/// Stops all that runs until it is cleared.
const UNTIL_CLEARED: u8 = 2;

static STOP: AtomicU8 = AtomicU8::new(NONE);

/// Asks what runs in this process to stop at its next piece. Only stores one flag, so a signal handler may call it.
///
/// What stops forgets it: one interrupt stops one call. [`Run::steps`](crate::train::Run::steps) forgets an earlier one when
/// it begins; other calls end at once because of it.
///
/// `notebooks/07_train_stop_resume.ipynb` explains it.
pub fn interrupt() {
    // One that holds longer is not made shorter.
    let _ = STOP.compare_exchange(NONE, ONCE, Ordering::SeqCst, Ordering::SeqCst);
}

/// As [`interrupt`], for everything until [`clear_interrupt`]: a notebook's cell that calls one thing after the other ends as a
/// whole. A signal handler may call it.
pub fn interrupt_until_cleared() {
    STOP.store(UNTIL_CLEARED, Ordering::SeqCst);
}

/// Whether [`interrupt`] was called and not yet answered. A loop of your own asks it.
pub fn interrupted() -> bool {
    STOP.load(Ordering::Relaxed) != NONE
}

/// Forgets an interrupt of either kind.
pub fn clear_interrupt() {
    STOP.store(NONE, Ordering::SeqCst);
}

/// Whether there was an interrupt; forgets it, unless it holds until it is cleared. A loop that stops because of it calls this.
pub fn take_interrupt() -> bool {
    match STOP.compare_exchange(ONCE, NONE, Ordering::SeqCst, Ordering::SeqCst) {
        Ok(_) => true,
        Err(now) => now == UNTIL_CLEARED,
    }
}

/// What a loop does when it begins: an interrupt from before does not stop it. Whether one holds all the same.
pub(crate) fn begin() -> bool {
    STOP.compare_exchange(ONCE, NONE, Ordering::SeqCst, Ordering::SeqCst) == Err(UNTIL_CLEARED)
}

/// An error if there was an interrupt: "interrupted while `doing`".
pub(crate) fn check(doing: impl FnOnce() -> String) -> Result<()> {
    if interrupted() { Err(taken(doing())) } else { Ok(()) }
}

/// The error of a call that ends because of an interrupt, which is thereby answered.
pub(crate) fn taken(doing: String) -> Error {
    take_interrupt();
    Error::new(format!("interrupted while {doing}")).next("call it again when it shall go on; nothing else was changed")
}
