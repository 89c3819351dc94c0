//! What the policy keeps: for the background, which takes it into use, and for who asks what another one would keep.

use crate::points::every;
use crate::resolve::resolve;
use crate::service::{Service, error, now_ns, store_error};
use varve_control::{
    ControlError, Instant, PolicyChange, PolicyInfo, Reporter, StorePolicy, StoreReply, space_bytes,
};
use varve_format::WallTime;
use varve_store::{
    Compression, Ladder, Nanoseconds, Plan, Policy, VolumeStore, parse_span, show_span,
};

const DAY_NS: i64 = 86_400_000_000_000;

/// The store's policy as retention needs it.
pub(crate) fn policy_of(policy: &StorePolicy) -> Result<Policy, String> {
    let window = |text: &str| match text.trim() {
        "" => Ok(0),
        text => parse_span(text),
    };
    Ok(Policy {
        ladder: policy.keep.parse::<Ladder>()?,
        immutable: window(&policy.immutable)?,
    })
}

impl Service {
    /// Takes what the policy says now into use.
    pub(crate) fn retain(&self, id: &str, policy: &Policy) -> Result<(), varve_store::StoreError> {
        let now = WallTime(self.clock_ns());
        // What is not known is not decided about.
        if self.if_open(id, |store| store.is_partly_unknown()) == Some(true) {
            return Ok(());
        }
        let Some(job) = self.if_open(id, |store| store.plan_by(policy, now, WallTime(now_ns())))
        else {
            return Ok(());
        };
        let Some(plan) = job.run()? else {
            return Ok(());
        };
        drop(job);
        let kept = self.if_open(id, |store| store.keep(&plan));
        kept.unwrap_or(Ok(false)).map(|_| ())
    }

    /// What a policy keeps of a volume's history.
    pub(crate) fn policy(
        &self,
        volume: &str,
        change: PolicyChange,
        bytes: bool,
        reporter: &mut Reporter<'_>,
    ) -> Result<StoreReply, ControlError> {
        let wrong = |why: String| error("X006-policy", why);
        let stored = StorePolicy::load(&self.paths().store_policy()).map_err(wrong)?;
        let stored = stored.with(change);
        every(&stored.points).map_err(wrong)?;
        space_bytes(&stored.space, 0).map_err(wrong)?;
        let policy = policy_of(&stored).map_err(wrong)?;
        let id = self.id_of(volume)?;
        let now = WallTime(self.clock_ns());
        let job = self.with_store(&id, |store| {
            Ok(store.plan_by(&policy, now, WallTime(now_ns())))
        })?;
        let plan = job.run().map_err(|e| store_error(&e))?;
        drop(job);
        let mut info = self.with_store(&id, |store| told(store, &policy, plan.as_ref(), now))?;
        info.points_every.clone_from(&stored.points.every);
        info.points_freeze = stored.points.freeze;
        info.space = self.space(&stored.space);
        if let Some(plan) = plan.filter(|_| bytes) {
            let sweep = self.with_store(&id, |store| {
                Ok(store.sweep_for(&plan.kept, Compression::default()))
            })?;
            let (mut gone, mut kept) = (0, 0);
            if let Some(mut sweep) = sweep {
                let total = sweep.left() as u64;
                while let Some(verdict) = sweep.look().map_err(|e| store_error(&e))? {
                    gone += verdict.gone_bytes;
                    kept += verdict.kept_bytes;
                    if !reporter.report(total - sweep.left() as u64, total) {
                        return Err(error("S012-interrupted", "nobody waits for the answer"));
                    }
                }
            }
            info.gone_and_kept_bytes = Some((gone, kept));
        }
        Ok(StoreReply::Policy {
            policy: Box::new(info),
        })
    }

    /// Pins an instant, or takes the pin out.
    pub(crate) fn pin(
        &self,
        volume: &str,
        instant: &Instant,
        pinned: bool,
    ) -> Result<StoreReply, ControlError> {
        let (id, behind) = self.refreshed_for(volume, instant)?;
        self.with_store(&id, |store| {
            let lsn = resolve(store, instant, behind.as_ref())?;
            let changed = match pinned {
                true => store.pin(lsn).map(|()| true),
                false => store.unpin(lsn),
            };
            if !changed.map_err(|e| store_error(&e))? {
                return Err(error(
                    "I008-pin",
                    format!("lsn:{lsn} is not pinned; `varve history` lists pins"),
                ));
            }
            Ok(StoreReply::Resolved {
                lsn: lsn.0,
                time_ns: store.time_of(lsn).map_err(|e| store_error(&e))?.0,
            })
        })
    }
}

fn told(
    store: &VolumeStore,
    policy: &Policy,
    plan: Option<&Plan>,
    now: WallTime,
) -> Result<PolicyInfo, ControlError> {
    let show = |span: Nanoseconds| match span {
        0 => String::new(),
        span => show_span(span),
    };
    let mut info = PolicyInfo {
        keep: policy.ladder.to_string(),
        immutable: show(policy.immutable),
        now_ns: now.0,
        stored_bytes: store.stored_bytes(),
        bytes_per_day: per_day(store, now),
        ..PolicyInfo::default()
    };
    let kept = plan.map_or(store.kept().as_ref(), |plan| &plan.kept);
    (info.below_lsn, info.below_ns) = (kept.below.0, kept.below_time.0);
    let first = kept.entries.first();
    info.first = first.map(|entry| (entry.lsn().0, entry.time().0));
    if let Some(plan) = plan {
        let name =
            |rung: &varve_store::Rung| format!("{} {}", show_span(rung.step), show_span(rung.age));
        let names = policy.ladder.rungs.iter().map(name);
        info.rungs = names.zip(plan.by_rung.iter().copied()).collect();
        (info.points, info.pinned) = (plan.points, plan.pinned);
    }
    Ok(info)
}

/// Bytes that a day adds, by the last day, or by what there is of it.
pub(crate) fn per_day(store: &VolumeStore, now: WallTime) -> u64 {
    let since = now.0.saturating_sub(DAY_NS);
    let lately = store
        .segments()
        .filter(|segment| segment.stored_at.0 > since);
    let (mut bytes, mut first) = (0u64, now.0);
    for segment in lately {
        bytes += segment.stored_bytes;
        first = first.min(segment.stored_at.0);
    }
    let span = (now.0 - first).clamp(60_000_000_000, DAY_NS);
    (u128::from(bytes) * DAY_NS as u128 / span as u128) as u64
}
