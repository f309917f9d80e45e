//! What each action does.

use std::iter::Peekable;

use super::{Run, Stop};
use crate::plan::OpKind;
use crate::range::SectorRange;
use crate::script::{Act, Action, Recovery};
use crate::sector::SECTOR;
use crate::sim::oracles::Ended;
use crate::sim::subject::{Open, declared_wrong};
use crate::sim::trace::What;

impl Run<'_> {
    pub(super) fn issue(&mut self, actions: &mut Peekable<&mut dyn Iterator<Item = Action>>) -> Result<(), Stop> {
        if let Some(next) = self.sweep {
            self.sweep_on(next);
            return Ok(());
        }
        let Some(Action { worker, act }) = actions.next() else { return Ok(()) };
        match act {
            Act::Op { kind, range } => {
                self.counts.ops += 1;
                self.counts.of_kind[kind as usize] += 1;
                self.begin(self.worker(worker), kind, range);
            }
            Act::PowerCut => self.power_cut()?,
            Act::Kill => self.kill()?,
            Act::Reopen => {
                self.counts.reopens += 1;
                self.driver.stop();
                self.close();
                self.open(Open::Reopen)?;
            }
            Act::FaultsOff | Act::FaultsOn => {
                let on = act == Act::FaultsOn;
                if let Some(faults) = self.subject.faults() {
                    faults.switch(on);
                    self.judges.observe_switch(on);
                }
                let now = self.driver.now;
                self.trace.note(What::Faults, [u64::from(on), 0, 0], || format!("{now}: faults {on}"));
                if !on {
                    self.driver.release(true, &mut self.trace);
                }
            }
            Act::Sweep => {
                self.counts.sweeps += 1;
                self.sweep = Some(self.options.areas.first().map_or(0, |area| area.first));
            }
        }
        Ok(())
    }

    /// Reads the next part of a sweep.
    fn sweep_on(&mut self, next: u64) {
        let areas = &self.options.areas;
        let area = areas.iter().find(|area| area.contains(next));
        let area = area.copied().unwrap_or(SectorRange::device(self.setup.bytes));
        let block = u64::from(self.setup.logical_block) / SECTOR as u64;
        let most = (u64::from(self.setup.max_io_bytes) / SECTOR as u64 / block * block).max(block);
        let range = SectorRange::new(next, most.min(area.end() - next));
        let others = areas.iter().map(|area| area.first).find(|first| *first >= range.end());
        self.sweep = if range.end() < area.end() { Some(range.end()) } else { others };
        self.begin(self.setup.workers as usize, OpKind::Read, range);
    }

    /// ADD and START, where the device is new.
    pub(super) fn open(&mut self, why: Open) -> Result<(), Stop> {
        let same_device = why == Open::AfterKill && self.setup.recovery != Recovery::None;
        if !same_device && !self.ids.add() {
            let taken = format!("{} device ids are taken, and none of them is in use", self.ids.taken());
            self.judges.resources("the device cannot start: no id is left", vec![taken])?;
            self.ids.reboot();
        }
        self.stopping = false;
        let server = self.subject.open(self.medium.as_ref(), why);
        let geometry = self.subject.geometry();
        let now = self.driver.now;
        self.trace.note(What::Open, [why as u64, geometry.size, 0], || format!("{now}: start: {why:?}"));
        let wrong = declared_wrong(&self.setup, &geometry);
        if !wrong.is_empty() {
            self.judges.resources("the device is not what it should be", wrong)?;
        }
        if let Err(tag) = self.driver.start(server, geometry) {
            let note = format!("queue {} tag {} is not fetched", tag.queue, tag.tag);
            self.hangs("START".to_owned(), vec![note], None)?;
        }
        Ok(())
    }

    /// DEL.
    pub(super) fn close(&mut self) {
        let given_back = self.subject.release();
        self.ids.remove(given_back);
        let now = self.driver.now;
        self.trace.note(What::Close, [given_back.into(), 0, 0], || format!("{now}: closed"));
    }

    fn kill(&mut self) -> Result<(), Stop> {
        let in_flight = self.driver.in_flight() > 0;
        if !self.driver.kill(&mut self.trace) {
            return Ok(());
        }
        self.counts.kills += 1;
        self.counts.kills_in_flight += u64::from(in_flight);
        self.judges.observe_calls();
        self.judges.observe_death(self.setup.recovery == Recovery::Reissue);
        if self.setup.recovery == Recovery::None {
            self.close();
            self.open(Open::AfterKill)?;
        }
        Ok(())
    }

    fn power_cut(&mut self) -> Result<(), Stop> {
        self.counts.power_cuts += 1;
        self.counts.power_cuts_in_flight += u64::from(self.driver.in_flight() > 0);
        self.judges.observe_calls();
        let (judges, watched) = (&mut self.judges, &mut self.watched);
        self.driver.vanish(|slot, bio| {
            if let Some(watched) = watched[slot as usize].take() {
                judges.observe_lost(watched, Ended::of(bio));
            }
        });
        self.depth.fill(0);
        self.sweep = None;
        let cut = self.medium.as_ref().map(|medium| medium.power_cut(&mut self.rng)).unwrap_or_default();
        self.counts.changes_kept += cut.kept;
        self.counts.changes_lost += cut.lost;
        self.counts.changes_torn += cut.torn;
        let now = self.driver.now;
        self.trace.note(What::Cut, [cut.kept, cut.lost, cut.torn], || format!("{now}: the power is cut: {cut:?}"));
        self.judges.observe_power_cut()?;
        self.ids.reboot();
        self.open(Open::AfterPowerCut)
    }
}
