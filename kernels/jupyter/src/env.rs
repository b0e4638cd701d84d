//! Names of the environment variables with which the kernel's processes find each other.

/// The socket on which the kernel waits for the process that runs the cells.
pub const LINK: &str = "TUNEBOOK_KERNEL_LINK";
/// The kernel's workspace.
pub const SESSION: &str = "TUNEBOOK_KERNEL_SESSION";
/// The shared object that the cells are linked with.
pub const TOOLKIT: &str = "TUNEBOOK_KERNEL_TOOLKIT";
/// `PID:SOCKET`: where the library in process PID sends its displays.
pub const DISPLAY: &str = "TUNEBOOK_DISPLAY";
/// The repository.
pub const REPOSITORY: &str = "TUNEBOOK_REPOSITORY";

/// What the kernel replaces for evcxr and rust-analyzer, and where it keeps the user's own.
pub const REPLACED: [(&str, &str); 2] = [("PATH", "TUNEBOOK_USER_PATH"), ("CARGO_HOME", "TUNEBOOK_USER_CARGO_HOME")];
