//! The kernel as a front end meets it: real processes, real sockets. See `kernel/front.rs`.

#[allow(dead_code)]
#[path = "../src/client.rs"]
mod client;
#[path = "kernel/front.rs"]
mod front;
#[allow(dead_code)]
#[path = "../src/wire.rs"]
mod wire;

#[path = "kernel/cells.rs"]
mod cells;
#[path = "kernel/failures.rs"]
mod failures;
#[path = "kernel/interrupts.rs"]
mod interrupts;
#[path = "kernel/protocol.rs"]
mod protocol;
#[path = "kernel/sessions.rs"]
mod sessions;
