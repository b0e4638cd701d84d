//! Copies between the arena and pinned host memory that run beside the computation, on a stream of their own.

use std::collections::HashMap;

use cudarc::driver::{result, sys};

use super::gpu::Gpu;
use super::libraries::failed;
use crate::Result;
use crate::engine::ops::TensorId;

/// The stream of copies, and the event after the last copy of each tensor.
pub(super) struct Transfers {
    stream: sys::CUstream,
    /// Recorded in the stream of computation before a copy starts.
    before: sys::CUevent,
    done: HashMap<TensorId, sys::CUevent>,
}

impl Transfers {
    /// # Errors
    /// What the driver says.
    pub fn new() -> Result<Self> {
        let stream =
            result::stream::create(result::stream::StreamKind::NonBlocking).map_err(|e| failed("cuStreamCreate", e))?;
        Ok(Transfers { stream, before: event()?, done: HashMap::new() })
    }

    /// Copies `bytes` after what the stream of computation has been given so far. `tensor` names the copy.
    ///
    /// # Errors
    /// What the driver says.
    pub fn start(&mut self, gpu: &Gpu, tensor: TensorId, to: u64, from: u64, bytes: u64) -> Result<()> {
        // SAFETY: streams and events live as long as `self`; the ranges are inside allocations, by the plan.
        unsafe {
            result::event::record(self.before, gpu.stream).map_err(|e| failed("cuEventRecord", e))?;
            wait(self.stream, self.before)?;
            sys::cuMemcpyAsync(to, from, bytes as usize, self.stream)
                .result()
                .map_err(|e| failed("cuMemcpyAsync", e))?;
            let done = match self.done.get(&tensor) {
                Some(done) => *done,
                None => {
                    let done = event()?;
                    self.done.insert(tensor, done);
                    done
                }
            };
            result::event::record(done, self.stream).map_err(|e| failed("cuEventRecord", e))
        }
    }

    /// The stream of computation waits for the last copy of a tensor.
    ///
    /// # Errors
    /// What the driver says.
    pub fn wait_for(&self, gpu: &Gpu, tensor: TensorId) -> Result<()> {
        match self.done.get(&tensor) {
            // SAFETY: both live.
            Some(done) => unsafe { wait(gpu.stream, *done) },
            None => Ok(()),
        }
    }

    /// Frees the handles, once the copies are done; the card's context is this thread's.
    pub fn close(&mut self) {
        // SAFETY: made by this value, not used again.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            for event in self.done.drain().map(|(_, e)| e).chain([self.before]) {
                let _ = result::event::destroy(event);
            }
            let _ = result::stream::destroy(self.stream);
        }
    }
}

fn event() -> Result<sys::CUevent> {
    result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(|e| failed("cuEventCreate", e))
}

/// # Safety
/// Both are valid.
unsafe fn wait(stream: sys::CUstream, event: sys::CUevent) -> Result<()> {
    // SAFETY: by the caller.
    unsafe { result::stream::wait_event(stream, event, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT) }
        .map_err(|e| failed("cuStreamWaitEvent", e))
}
