//! The memory that full fine-tuning may take, and whether a job has room in it. Deltas are small and are not asked.

use std::sync::Arc;

use crate::admission::train_params::MemoryEstimate;

/// Bytes at one moment; `None` where nobody says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// What a job can have now.
    pub available: Option<u64>,
    /// What a job could have if nothing else ran, at most: the configured limit, or all that the machine has.
    pub total: Option<u64>,
}

/// Tells the memory of this moment.
#[derive(Clone)]
pub struct MemoryProbe(Arc<dyn Fn() -> Memory + Send + Sync>);

impl std::fmt::Debug for MemoryProbe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("MemoryProbe").field(&self.now()).finish()
    }
}

/// Why a job has no room.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Shortage {
    /// The numbers, and what to do.
    pub message: String,
    /// Whether it is the same at any other time.
    pub lasting: bool,
}

impl MemoryProbe {
    /// Asks a function.
    pub fn new(now: impl Fn() -> Memory + Send + Sync + 'static) -> Self {
        Self(Arc::new(now))
    }

    /// A limit in bytes; without one, what the system has, within the control group's limit. Nothing is known of a GPU, and
    /// where the system does not say.
    pub fn of_machine(limit: Option<u64>, on_cpu: bool) -> Self {
        Self::new(move || match limit {
            Some(_) => Memory { available: limit, total: limit },
            None if on_cpu => of_system(),
            None => Memory { available: None, total: None },
        })
    }

    /// The memory now.
    pub fn now(&self) -> Memory {
        (self.0)()
    }
}

impl Memory {
    /// What a job can have at this moment; `None` where nobody says.
    pub fn room(&self) -> Option<u64> {
        least(self.available, self.total)
    }

    /// Whether a job that needs this much beside the resident base has room: now, or, where other jobs will give theirs
    /// back first (`later`), at all.
    ///
    /// # Errors
    /// [`Shortage`], with the numbers.
    pub fn check(&self, need: &MemoryEstimate, later: bool) -> Result<(), Shortage> {
        let all = need.total();
        let lasting = self.total.is_some_and(|total| total < all);
        let room = if lasting || later { self.total } else { self.room() };
        let Some(room) = room.filter(|room| *room < all) else { return Ok(()) };
        let MemoryEstimate { parameters, gradients, optimizer, activations } = need;
        let have = if lasting { "is all that a job can have" } else { "are available now" };
        let message = format!(
            "full fine-tuning needs {all} bytes beside the resident base (weights {parameters}, gradients {gradients}, \
             optimizer {optimizer}, activations {activations}); {room} {have}: train a delta, shorten hyper.max_length or \
             lower hyper.batch_size"
        );
        Err(Shortage { message, lasting })
    }
}

/// What the system has, within the limits of the control groups that this process is in.
fn of_system() -> Memory {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let meminfo = read("/proc/meminfo").unwrap_or_default();
    let groups = read("/proc/self/cgroup").unwrap_or_default();
    let (mut available, mut total) = (field(&meminfo, "MemAvailable:"), field(&meminfo, "MemTotal:"));
    for group in groups.lines().flat_map(levels) {
        let [max, used] = group.files.map(|file| read(&format!("{}/{file}", group.folder))?.trim().parse::<u64>().ok());
        // files that were read count as used there, though they give way
        let cached = read(&format!("{}/memory.stat", group.folder)).and_then(|text| inactive_file(&text));
        let used = used.map(|used| used.saturating_sub(cached.unwrap_or(0)));
        total = least(total, max);
        available = least(available, max.zip(used).map(|(max, used)| max.saturating_sub(used)));
    }
    Memory { available, total }
}

fn least(a: Option<u64>, b: Option<u64>) -> Option<u64> {
    a.into_iter().chain(b).min()
}

/// A control group that may limit memory: its folder, and its files of the limit and of the use.
#[derive(Debug, PartialEq, Eq)]
struct Group {
    folder: String,
    files: [&'static str; 2],
}

/// The group of a line of `/proc/self/cgroup`, and those that it lies in, of cgroup v2 (`0::path`) or of v1's memory
/// controller. Within a container the path may be the host's, while the container's own group is mounted at the root.
fn levels(line: &str) -> Vec<Group> {
    let mut parts = line.splitn(3, ':').skip(1);
    let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { return Vec::new() };
    let (mount, files) = match controllers {
        "" => ("/sys/fs/cgroup", ["memory.max", "memory.current"]),
        c if c.split(',').any(|c| c == "memory") => {
            ("/sys/fs/cgroup/memory", ["memory.limit_in_bytes", "memory.usage_in_bytes"])
        }
        _ => return Vec::new(),
    };
    let path = path.trim_end_matches('/');
    // the root ends where the first name begins, each group where the next one does
    let ends = path.match_indices('/').map(|(at, _)| at).chain([path.len()]);
    ends.map(|end| Group { folder: format!("{mount}{}", &path[..end]), files }).collect()
}

/// A field of `/proc/meminfo`, in bytes.
fn field(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// `inactive_file` of a control group's `memory.stat`, in bytes.
fn inactive_file(stat: &str) -> Option<u64> {
    stat.lines().find_map(|l| l.strip_prefix("inactive_file "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_in_bytes_and_a_limit_goes_before_it() {
        let text = "MemTotal:       24000000 kB\nMemFree:         1000000 kB\nMemAvailable:   12000000 kB\n";
        assert_eq!(field(text, "MemAvailable:"), Some(12_000_000 * 1024));
        assert_eq!(field("MemTotal: 5 kB\n", "MemAvailable:"), None);
        assert_eq!(inactive_file("file 9\ninactive_file 77\n"), Some(77));
        let folders = |line| levels(line).into_iter().map(|g| g.folder).collect::<Vec<_>>();
        let service =
            ["/sys/fs/cgroup", "/sys/fs/cgroup/system.slice", "/sys/fs/cgroup/system.slice/deltaserve.service"];
        assert_eq!(folders("0::/system.slice/deltaserve.service"), service);
        assert_eq!(folders("0::/"), ["/sys/fs/cgroup"]);
        assert_eq!(folders("4:cpu,memory:/box"), ["/sys/fs/cgroup/memory", "/sys/fs/cgroup/memory/box"]);
        assert_eq!((folders("5:cpu:/box"), folders("nonsense")), (vec![], vec![]));
        let machine = MemoryProbe::of_machine(None, true).now();
        assert!(machine.available.is_some_and(|b| b > 0) && machine.total >= machine.available);
        assert_eq!(MemoryProbe::of_machine(None, false).now(), Memory { available: None, total: None });
        let limited = MemoryProbe::of_machine(Some(5), false).now();
        assert_eq!(limited, Memory { available: Some(5), total: Some(5) });
    }

    #[test]
    fn a_shortage_says_its_numbers_and_whether_it_lasts() {
        let need = MemoryEstimate { parameters: 100, gradients: 200, optimizer: 300, activations: 400 };
        let check = |available, total, later| Memory { available, total }.check(&need, later);
        assert_eq!(check(Some(1000), Some(1000), false), Ok(()));
        assert_eq!(check(None, None, false), Ok(()));
        assert_eq!(check(Some(999), Some(2000), true), Ok(()), "others will give theirs back");
        let now = check(Some(999), Some(2000), false).unwrap_err();
        assert!(!now.lasting && now.message.contains("999 are available now"), "{now}");
        for later in [false, true] {
            let never = check(Some(5), Some(999), later).unwrap_err();
            assert!(never.lasting && never.message.contains("999 is all"), "{never}");
            for number in [1000, 100, 200, 300, 400] {
                assert!(never.message.contains(&number.to_string()), "{never}");
            }
        }
    }
}
