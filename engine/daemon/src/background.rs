//! What goes on behind the store's back: maps are made, segments are settled, what the policy does not keep is pruned. One thread for all volumes, within its share of a processor, and without
//! the store's lock but for the moment in which a finished file gets its place.
//!
//! Proving that a settled segment comes back from the disk as it was is a thread of its own: it reads while the next one is compressed.

use crate::retention::policy_of;
use crate::service::Service;
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use nix::sys::statvfs::statvfs;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};
use varve_control::StorePolicy;
use varve_format::SegmentSequence;
use varve_store::{Compression, MapJob, Policy, SettleJob, Settling, StoreError, Sweep, Swept};

/// How often it looks for work while there is none.
const IDLE: Duration = Duration::from_secs(1);
/// How long a volume is left alone after something failed.
const BACK_OFF: Duration = Duration::from_secs(60);
/// How often it is looked whether the key is there that a history waits for.
const KEYS_EVERY: Duration = Duration::from_secs(5);
/// How often segments are tried again that could not be read when their history was opened.
const UNREAD_EVERY: Duration = Duration::from_secs(600);
/// How often the policy is asked what it keeps; more often if it keeps everything for moments only.
const RETAIN_EVERY: Duration = Duration::from_secs(30);
/// How long pruning has its turn, about.
const PRUNE_FOR: Duration = Duration::from_millis(300);
/// Segments that are looked at in one go for whether they are encrypted.
const LOOKED_AT: usize = 64;
/// Room that settling leaves on the store's disk beside the segment that it writes: the logs must go on being drained.
pub(crate) const ROOM_BYTES: u64 = 256 << 20;

/// What decides about what goes.
#[derive(Clone, PartialEq)]
struct Retention {
    policy: Policy,
    space: String,
}

fn every(policy: &Policy) -> Duration {
    let all = policy.ladder.all.unwrap_or(i64::MAX).unsigned_abs();
    RETAIN_EVERY.min(Duration::from_nanos(all / 3))
}

/// Whether it may be better by itself in a while.
fn passes(error: &StoreError) -> bool {
    matches!(error, StoreError::Full(_) | StoreError::ReadOnly(_)) || error.wants_key()
}

enum Work {
    Map(MapJob),
    Settle(SettleJob),
}

struct Background {
    service: Arc<Service>,
    /// Segments that could not be settled, by volume; tried again when the daemon starts.
    given_up: BTreeMap<String, BTreeSet<u64>>,
    /// Being proved.
    under_way: BTreeSet<(String, u64)>,
    resting: BTreeMap<String, Instant>,
    /// When the policy was asked last.
    retained: BTreeMap<String, Instant>,
    sweeps: BTreeMap<String, Sweep>,
    /// Histories of which it was said that they are locked.
    locked: BTreeSet<String>,
    /// From which segment on those are looked for that should be encrypted.
    plain_from: BTreeMap<String, SegmentSequence>,
    /// What the policy file says, and since when.
    policy: Option<(Retention, Instant)>,
    proofs: Sender<(String, u64, Settling)>,
    proved: Receiver<(String, u64, Option<StoreError>)>,
    said: String,
    /// How many threads compress.
    threads: usize,
    /// When it was looked for histories that wait for a key which is there, and for segments that could not be read.
    asked_keys: Instant,
    tried_unread: Instant,
}

/// Without that nothing would be compressed or pruned any more, and nobody would hear of it. systemd starts the daemon anew.
fn proving_has_ended() -> ! {
    eprintln!("varved: proving has ended unexpectedly; ending, to begin anew");
    std::process::exit(1);
}

/// Works until the process ends.
pub(crate) fn run(service: Arc<Service>) {
    // One being proved, one waiting: no more unproved files than that lie about.
    let (proofs, jobs) = bounded::<(String, u64, Settling)>(1);
    // Without a bound: whoever proves must never wait for who compresses, who waits for it. There is at most one outcome for each job.
    let (outcomes, proved) = unbounded();
    let prover = Arc::clone(&service);
    std::thread::spawn(move || {
        for (id, sequence, settling) in jobs {
            let outcome = settling.prove().and_then(|done| {
                prover
                    .if_open(&id, |store| store.replace(&done))
                    .unwrap_or(Ok(()))
            });
            let _ = outcomes.send((id, sequence, outcome.err()));
        }
    });
    service.open_all();
    let mut background = Background {
        service,
        given_up: BTreeMap::new(),
        under_way: BTreeSet::new(),
        resting: BTreeMap::new(),
        retained: BTreeMap::new(),
        sweeps: BTreeMap::new(),
        plain_from: BTreeMap::new(),
        locked: BTreeSet::new(),
        policy: None,
        proofs,
        proved,
        said: String::new(),
        threads: 1,
        asked_keys: Instant::now(),
        tried_unread: Instant::now(),
    };
    loop {
        background.turn();
    }
}

impl Background {
    fn turn(&mut self) {
        while let Ok((id, sequence, failed)) = self.proved.try_recv() {
            self.proved(id, sequence, failed);
        }
        let path = self.service.paths().store_policy();
        let policy = StorePolicy::load(&path).and_then(|policy| {
            let named = |why| format!("{}: {why}", path.display());
            let compression = policy.compression.parse::<Compression>().map_err(named)?;
            let kept = Retention {
                policy: policy_of(&policy).map_err(named)?,
                space: policy.space,
            };
            Ok((compression, policy.background_percent, Some(kept)))
        });
        let (compression, percent, kept) = policy.unwrap_or_else(|why| {
            self.say(format!("{why}. Nothing is pruned"));
            let percent = StorePolicy::default().background_percent;
            (Compression::default(), percent, None)
        });
        self.service.retry_keys();
        self.reopen_unknown();
        let _ = self.service.clock_ns(); // A jump is noticed between two looks.
        let kept = self.settled_policy(kept);
        // Whole processors: with a part of one more it would only wait for that.
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        self.threads = (percent as usize / 100).clamp(1, cores);
        let percent = percent.min(100);
        let began = Instant::now();
        let (mut worked, mut pruned) = (false, false);
        for id in self.service.open_ids() {
            worked |= self.one(&id, compression);
            if let Some(kept) = &kept {
                pruned |= self.prune(&id, &kept.policy, compression);
            }
        }
        // What was struck goes first: only then it is known whether there is still too much.
        if let Some(kept) = kept.filter(|_| !pruned) {
            pruned = self.make_room(&kept);
        }
        if worked || pruned {
            let took = began.elapsed();
            std::thread::sleep(took * (100 - percent) / percent);
        } else {
            std::thread::sleep(IDLE);
        }
    }

    /// What could not be read of a history when it was opened is tried again now and then.
    fn reopen_unknown(&mut self) {
        if self.asked_keys.elapsed() < KEYS_EVERY {
            return;
        }
        self.asked_keys = Instant::now();
        let unread_is_due = self.tried_unread.elapsed() >= UNREAD_EVERY;
        if unread_is_due {
            self.tried_unread = Instant::now();
        }
        self.service.reopen_unknown(unread_is_due);
    }

    /// The policy, once it has said the same for a while: a file that is being written anew may be empty, or away, for a moment.
    fn settled_policy(&mut self, policy: Option<Retention>) -> Option<Retention> {
        let policy = policy?;
        match &self.policy {
            Some((known, since)) if *known == policy => {
                (since.elapsed() >= every(&policy.policy)).then_some(policy)
            }
            _ => {
                self.policy = Some((policy, Instant::now()));
                None
            }
        }
    }

    /// One piece of work for a volume, if there is any.
    fn one(&mut self, id: &str, compression: Compression) -> bool {
        if self.is_resting(id) {
            return false;
        }
        let given_up = self.given_up.get(id);
        let given_up =
            |sequence: u64| given_up.is_some_and(|given_up| given_up.contains(&sequence));
        let except = |sequence: u64| {
            given_up(sequence) || self.under_way.contains(&(id.to_owned(), sequence))
        };
        let room = statvfs(&self.service.paths().store()).map_or(u64::MAX, |disk| {
            disk.blocks_available() * disk.fragment_size()
        });
        let fits = |bytes: u64| room >= bytes + ROOM_BYTES;
        let from = self
            .plain_from
            .get(id)
            .copied()
            .unwrap_or(SegmentSequence(0));
        let mut next = from;
        let mut locked = None;
        let work = self.service.if_open(id, |store| {
            let map = store.next_map().filter(|job| fits(job.bytes()));
            // What makes room comes before what takes it, where there is little.
            map.map(Work::Map).or_else(|| {
                // Nothing is settled in the clear that should not be.
                let encrypts = store
                    .encrypts()
                    .map_err(|error| locked = Some(error))
                    .ok()?;
                let job = store.next_to_settle(compression, &except);
                let job = job.filter(|job| fits(job.data_bytes()));
                let mut plain = || {
                    let found = store
                        .next_to_encrypt(compression, from, LOOKED_AT, &except, &given_up)
                        .ok()?;
                    next = found.1;
                    found.0.filter(|job| fits(job.data_bytes()))
                };
                let job = job.or_else(|| if encrypts { plain() } else { None });
                job.map(Work::Settle)
            })
        });
        match locked {
            // Said once, not at every turn.
            Some(error) if self.locked.insert(id.to_owned()) => {
                eprintln!("varved: {id}: {error}");
            }
            Some(_) => {}
            None => {
                self.locked.remove(id);
            }
        }
        self.plain_from.insert(id.to_owned(), next);
        match work.flatten() {
            None => next != from,
            Some(Work::Map(job)) => {
                self.map(id, &job);
                true
            }
            Some(Work::Settle(job)) => self.settle(id, job),
        }
    }

    /// Some steps of pruning, if there are any. What is being proved is waited for: both would replace the same file.
    fn prune(&mut self, id: &str, policy: &Policy, compression: Compression) -> bool {
        if self.is_resting(id) || !self.service.was_taken(id) {
            return false;
        }
        let every = every(policy);
        let due = |last: &Instant| last.elapsed() >= every;
        if self.retained.get(id).is_none_or(due) {
            self.retained.insert(id.to_owned(), Instant::now());
            match self.service.retain(id, policy) {
                Ok(()) => {}
                // What was struck before can be pruned all the same, and makes room; compressing does not wait for it.
                Err(error) => self.say(format!("{id}: what is kept cannot be decided: {error}")),
            }
        }
        let sweep = self.sweeps.remove(id);
        let sweep = self.service.if_open(id, |store| match sweep {
            Some(sweep) if sweep.is_for(store.kept()) => Some(sweep),
            _ => store.sweep(compression),
        });
        let Some(mut sweep) = sweep.flatten() else {
            return false;
        };
        while self.under_way.iter().any(|(volume, _)| volume == id) {
            let Ok((id, sequence, failed)) = self.proved.recv() else {
                proving_has_ended();
            };
            self.proved(id, sequence, failed);
        }
        let began = Instant::now();
        while began.elapsed() < PRUNE_FOR {
            match self.prune_step(id, &mut sweep) {
                Ok(true) => {}
                Ok(false) => return true,
                Err(error) => {
                    self.failed(id, None, &error);
                    return false;
                }
            }
        }
        self.sweeps.insert(id.to_owned(), sweep);
        true
    }

    /// Where histories take more than they may, the oldest instants go. Says whether some did.
    fn make_room(&mut self, kept: &Retention) -> bool {
        let ready = |id: &str| !self.is_resting(id) && self.service.was_taken(id);
        let made = self
            .service
            .make_room(&kept.space, kept.policy.immutable, ready);
        match made {
            Ok(Some(what)) => {
                eprintln!("varved: {what}");
                true
            }
            Ok(None) => false,
            Err((id, error)) => {
                self.failed(&id, None, &error);
                false
            }
        }
    }

    /// One step; says whether there are more.
    fn prune_step(&self, id: &str, sweep: &mut Sweep) -> Result<bool, StoreError> {
        match sweep.step()? {
            Swept::Done => return Ok(false),
            Swept::Read => {}
            Swept::Stays(sequence, hash) => {
                self.service
                    .if_open(id, |store| store.stays(sequence, hash));
            }
            Swept::Pruned(pruned) => {
                let replaced = self
                    .service
                    .if_open(id, |store| store.replace_pruned(&pruned));
                replaced.unwrap_or(Ok(()))?;
            }
        }
        Ok(true)
    }

    /// A proof has come to its end.
    fn proved(&mut self, id: String, sequence: u64, failed: Option<StoreError>) {
        if let Some(error) = failed {
            self.failed(&id, Some(sequence), &error);
        }
        self.under_way.remove(&(id, sequence));
    }

    fn is_resting(&self, id: &str) -> bool {
        let until = self.resting.get(id);
        until.is_some_and(|until| Instant::now() < *until)
    }

    fn map(&mut self, id: &str, job: &MapJob) {
        let made = job.run().and_then(|()| {
            self.service
                .if_open(id, |store| store.add_map(job))
                .unwrap_or(Ok(()))
        });
        if let Err(error) = made {
            self.failed(id, None, &error);
            // A smaller map that is damaged, or cannot be read, is not asked again, but made again; for anything else that does not pass by itself, this one is done without.
            let of_smaller_map = match &error {
                StoreError::Damaged(..) => true,
                StoreError::Io(path, _) => !job.writes(path),
                _ => false,
            };
            let smaller_map = job.reads_maps() && of_smaller_map;
            if !passes(&error) && !smaller_map {
                self.service.if_open(id, |store| store.give_up_map(job));
            }
        }
    }

    fn settle(&mut self, id: &str, job: SettleJob) -> bool {
        let sequence = job.sequence();
        match job.compress(self.threads) {
            Ok(settling) => {
                self.under_way.insert((id.to_owned(), sequence));
                if self
                    .proofs
                    .send((id.to_owned(), sequence, settling))
                    .is_err()
                {
                    proving_has_ended();
                }
            }
            Err(error) => self.failed(id, Some(sequence), &error),
        }
        true
    }

    fn failed(&mut self, id: &str, sequence: Option<u64>, error: &StoreError) {
        self.resting
            .insert(id.to_owned(), Instant::now() + BACK_OFF);
        if let Some(sequence) = sequence.filter(|_| !passes(error)) {
            self.given_up
                .entry(id.to_owned())
                .or_default()
                .insert(sequence);
        }
        // A history that was just forgotten takes its files with it.
        if self.service.if_open(id, |_| ()).is_some() {
            self.say(format!("{id}: {error}"));
        }
    }

    /// Says a thing once, not at every turn.
    fn say(&mut self, what: String) {
        if what != self.said {
            eprintln!("varved: {what}");
            self.said = what;
        }
    }
}
