//! How the environment shows itself.

use super::units::bytes;
use super::{Card, Show, shown};
use crate::Environment;

impl Show for Environment {
    fn card(&self) -> Card {
        Card::new(format!("tunebook {}", self.tunebook)).facts([
            ("device", self.device.clone()),
            ("threads", self.threads.to_string()),
            ("instructions", self.instructions.clone()),
            ("memory", bytes(self.memory_bytes)),
        ])
    }
}

shown!(Environment { tunebook, device, threads, instructions, memory_bytes });
