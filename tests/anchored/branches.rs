//! Who has the disk lets opens be cut short, keeps what each has left, and has the volume opened from whichever he likes. Once an
//! open is done, nothing from before it opens: whatever was prepared for a counter, and never counted.

use super::*;

/// Opens that were done.
static OPENED: AtomicU64 = AtomicU64::new(0);

/// A disk as it was, and how many opens and ticks were done by the state that it comes from.
struct Branch {
    disk: Disk,
    age: usize,
}

/// The disks of one volume, and its only anchor.
struct Branches {
    anchor: SimAnchor,
    rng: Rng,
    kept: Vec<Branch>,
    /// Opens and ticks that were done.
    done: usize,
}

impl Branches {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let io = formatted(&format_options(4096), seed);
        let anchor = SimAnchor::of(any_shape(&mut rng), &io, seed);
        let options = OpenOptions { open_id: rng.bytes(), ..open_options(&mut rng) };
        let begun = block_on(&io, open_anchored(&io, &key(), &options, (&anchor, AnchorPurpose::Begin)));
        drop(begun.expect("a new volume and a new anchor"));
        let disk = io.disk().fork(seed);
        anchor.held().unreliable = [0, 0, 20][rng.index(3)];
        Self { anchor, rng, kept: vec![Branch { disk, age: 0 }], done: 0 }
    }

    fn any(&mut self) -> usize {
        // The newest more often.
        let all = self.kept.len();
        if self.rng.chance(40) { all - 1 - self.rng.index(all.min(3)) } else { self.rng.index(all) }
    }

    /// A disk that was kept, with bodies of whichever.
    fn present(&mut self) -> (Disk, usize) {
        let one = self.any();
        let mut disk = self.kept[one].disk.fork(self.rng.next());
        for slot in BODIES {
            if self.rng.chance(40) {
                let other = self.any();
                disk.put_back(&self.kept[other].disk, Device::Meta, slot);
            }
        }
        disk.power_cut();
        (disk, self.kept[one].age)
    }

    fn keep(&mut self, io: &SimStorage, age: usize) {
        let crash = if self.rng.chance(50) { Disk::power_cut } else { Disk::kill };
        crash(&mut io.disk());
        let disk = io.disk().fork(self.rng.next());
        self.kept.push(Branch { disk, age });
    }

    /// One open of one disk, cut short or done, and perhaps a tick. `false`: what may be opened is not known any more.
    fn attempt(&mut self) -> bool {
        let (disk, mut age) = self.present();
        let io = SimStorage::new(disk);
        self.anchor.held().land();
        let anchor = self.anchor.at_host(&io);
        // Now and then somebody accepts what is there, on purpose.
        let is_reset = self.rng.chance(5);
        let purpose = if is_reset { AnchorPurpose::Reset } else { AnchorPurpose::Keep };
        let steps = if self.rng.chance(60) { self.rng.below(50) } else { u64::MAX };
        let options = OpenOptions { open_id: self.rng.bytes(), ..open_options(&mut self.rng) };
        let key = key();
        match block_on_steps(&io, open_anchored(&io, &key, &options, (&anchor, purpose)), steps) {
            Some(Ok((volume, keeper))) => {
                assert!(
                    is_reset || age == self.done,
                    "a state of {age} is accepted after {} opens and ticks ({:?})",
                    self.done,
                    anchor.shape()
                );
                self.done += 1;
                age = self.done;
                OPENED.fetch_add(1, Ordering::Relaxed);
                if self.rng.chance(50) {
                    let disk = io.disk().fork(self.rng.next());
                    self.kept.push(Branch { disk, age });
                    age = self.tick((&volume, &io), keeper, &anchor, age);
                }
            }
            Some(Err(OpenError::Anchor(AnchorError::Older { .. } | AnchorError::Bare { .. }))) => {}
            // It may have been accepted for good.
            Some(Err(OpenError::Anchor(AnchorError::Away(_)))) | None if is_reset => return false,
            Some(Err(OpenError::Anchor(AnchorError::Away(_) | AnchorError::Taken { .. }))) | None => {}
            Some(Err(e)) => panic!("{e}"),
        }
        self.keep(&io, age);
        true
    }

    /// A write and a tick, cut short or done. How old the disk is then.
    fn tick(
        &mut self,
        (volume, io): (&Volume, &SimStorage),
        mut keeper: AnchorKeeper,
        anchor: &SimAnchor,
        age: usize,
    ) -> usize {
        let (mut context, mut ticking) = (volume.context(0), volume.context(0));
        let (note, steps) = (note(), if self.rng.chance(50) { self.rng.below(20) } else { u64::MAX });
        let ticked = block_on_steps(
            io,
            async {
                let one = BlockRange::new(BlockIndex(1), 1);
                volume.write(io, &mut context, one, Buf::new(4096), Durability::MayBeLost).await.0.unwrap();
                keeper.tick((volume, io), &mut ticking, (anchor, &note)).await
            },
            steps,
        );
        match ticked {
            Some(Ok(Ticked::Anchored)) => self.done += 1,
            Some(Ok(_) | Err(KeepError::Anchor(AnchorError::Away(_)))) | None => return age,
            Some(Err(e)) => panic!("nobody else has opened it: {e}"),
        }
        self.done
    }
}

#[test]
fn nothing_from_before_an_open_that_was_done_is_accepted() {
    for seed in 0..if cfg!(debug_assertions) { 100 } else { 1000 } {
        let ended = std::panic::catch_unwind(|| {
            let mut all = Branches::new(seed);
            let _ = (0..20).all(|_| all.attempt());
        });
        assert!(ended.is_ok(), "seed {seed}");
    }
    let opened = OPENED.load(Ordering::Relaxed);
    println!("{opened} opens of branches were done");
    assert!(opened > 0);
}
