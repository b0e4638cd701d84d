//! Stopping a running loop from outside: a flag that loops ask between micro-steps.
//!
//! The library installs no signal handler; a front end (the Jupyter kernel, a program's own handler) calls
//! [`interrupt`]. A run that stops so has finished its micro-step and can go on or be resumed.

use std::sync::atomic::{AtomicBool, Ordering};

static STOP: AtomicBool = AtomicBool::new(false);

/// Asks every loop of this process to stop between two micro-steps. Only stores one flag, so a signal handler may call it.
///
/// `notebooks/07_train_stop_resume.ipynb` explains it.
pub fn interrupt() {
    STOP.store(true, Ordering::SeqCst);
}

/// Whether [`interrupt`] was called and not yet answered.
pub fn interrupted() -> bool {
    STOP.load(Ordering::SeqCst)
}

/// Forgets an interrupt: a loop calls this when it starts, so that an old one does not stop it.
pub fn clear_interrupt() {
    STOP.store(false, Ordering::SeqCst);
}

/// Whether [`interrupt`] was called; forgets it. A loop that stops because of it calls this, so that one interrupt stops one
/// loop.
pub fn take_interrupt() -> bool {
    STOP.swap(false, Ordering::SeqCst)
}
