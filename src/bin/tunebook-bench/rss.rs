//! Memory of this process on the host, from `/proc/self/status`.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Host memory of the process, in bytes; `None` where the system does not say.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rss {
    /// VmHWM: the largest resident set so far (file pages included), since the start or the last reset.
    pub peak: Option<u64>,
    /// RssAnon: resident pages that belong to no file.
    pub anonymous: Option<u64>,
}

/// What a piece of work added to the host memory of the process, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Growth {
    /// Of the peak of the resident set (VmHWM), over the resident set before.
    pub peak: Option<u64>,
    /// Of the peak of anonymous pages (RssAnon, looked at every few milliseconds).
    pub anonymous_peak: Option<u64>,
    /// Of anonymous pages that stay.
    pub anonymous_after: Option<u64>,
}

/// The process's memory now.
pub fn now() -> Rss {
    Rss { peak: field("VmHWM:"), anonymous: field("RssAnon:") }
}

fn field(name: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(name))?;
    Some(line.trim().trim_end_matches(" kB").trim().parse::<u64>().ok()? * 1024)
}

/// Runs `work` and measures what it adds.
pub fn watch<R>(work: impl FnOnce() -> R) -> (R, Growth) {
    // "5" sets VmHWM to what is resident now; where that is refused, an earlier peak hides a smaller one.
    let reset = fs::write("/proc/self/clear_refs", "5").is_ok();
    let before = now();
    let sampler = Sampler::start();
    let out = work();
    let sampled = sampler.stop();
    let after = now();
    let less = |a: Option<u64>, b: Option<u64>| Some(a?.saturating_sub(b?));
    let growth = Growth {
        peak: if reset { less(after.peak, before.peak) } else { None },
        anonymous_peak: less(Some(sampled.max(after.anonymous.unwrap_or(0))), before.anonymous),
        anonymous_after: less(after.anonymous, before.anonymous),
    };
    (out, growth)
}

/// A thread that looks at RssAnon while something else runs.
struct Sampler {
    done: Arc<AtomicBool>,
    most: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Sampler {
    fn start() -> Sampler {
        let (done, most) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (d, m) = (done.clone(), most.clone());
        let thread = std::thread::spawn(move || {
            while !d.load(Ordering::Relaxed) {
                m.fetch_max(now().anonymous.unwrap_or(0), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        Sampler { done, most, thread }
    }

    /// The most that was seen.
    fn stop(self) -> u64 {
        self.done.store(true, Ordering::Relaxed);
        let _ = self.thread.join();
        self.most.load(Ordering::Relaxed)
    }
}
