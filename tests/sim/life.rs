//! One life of a volume: requests on several queues, and its end, sudden or in good order.

use super::{
    Executor, elsewhere,
    exec::Step,
    rot::Rot,
    world::{Queue, World},
};
use std::{cell::RefCell, future::Future, rc::Rc};

/// One life: requests on several queues, until the power fails after so many steps.
/// `watch` sees every step.
pub fn live(world: &World, seed: u64, steps: u64, watch: impl FnMut()) {
    live_beside(world, seed, steps, std::future::ready(()), watch);
}

/// The same with one more task.
pub fn live_beside(world: &World, seed: u64, steps: u64, beside: impl Future<Output = ()>, watch: impl FnMut()) {
    Life::new(world, seed, beside).requests(steps, watch);
}

/// The tasks of one life. Dropped, the daemon is dead.
pub struct Life<'w> {
    world: &'w World,
    exec: Executor<'w>,
    queues: Vec<Rc<RefCell<Option<Queue>>>>,
}

impl<'w> Life<'w> {
    pub fn new(world: &'w World, seed: u64, beside: impl Future<Output = ()> + 'w) -> Self {
        elsewhere::crash();
        let mut exec = Executor::new(seed);
        let queues = Queue::all(&world.volume).into_iter().map(|queue| Rc::new(RefCell::new(Some(queue)))).collect();
        exec.spawn(world.checkpoints());
        exec.spawn(beside);
        if !world.distrust && (world.rng.borrow_mut().chance(15) || world.rot.is_some()) {
            exec.spawn(world.scrubs());
        }
        Self { world, exec, queues }
    }

    /// So many steps with requests on all queues.
    pub fn requests(&mut self, steps: u64, mut watch: impl FnMut()) {
        for _ in 0..steps {
            for queue in &self.queues {
                let (world, taken) = (self.world, queue.borrow_mut().take());
                if let Some(mut q) = taken {
                    let home = queue.clone();
                    self.exec.spawn(async move {
                        world.request(&mut q).await;
                        *home.borrow_mut() = Some(q);
                    });
                }
            }
            self.step();
            watch();
        }
    }

    /// So many steps without new requests: those that came are answered, and the disk rots on.
    pub fn quiet(&mut self, steps: u64, mut watch: impl FnMut()) {
        for _ in 0..steps {
            self.step();
            watch();
        }
    }

    /// No more requests come, as before a hand-over: those that did are answered, and written back.
    pub fn rest(mut self, mut watch: impl FnMut()) {
        [0, 1].iter().for_each(|thread| self.world.volume.end_write_back(*thread));
        let is_healing = |rot: &Rot| rot.healing.get() > 0;
        self.world.rot.iter().for_each(|rot| rot.rests.set(true));
        while self.world.rot.as_ref().is_some_and(is_healing)
            || self.world.at_checkpoint.get()
            || self.queues.iter().any(|queue| queue.borrow().is_none())
        {
            self.step();
            watch();
        }
    }

    fn step(&mut self) {
        if let Some(rot) = &self.world.rot {
            rot.step(self.world);
        }
        assert_eq!(self.exec.step(&self.world.io), Step::Ran, "deadlock");
    }
}
