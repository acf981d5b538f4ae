//! Sets of the tasks of one thread, a bit for each.

use std::cell::Cell;

pub type TaskIndex = usize;

/// The word and the bit of a task.
pub fn bit_of(task: TaskIndex) -> (usize, u64) {
    (task / 64, 1 << (task % 64))
}

/// Some of the tasks. Memory is taken once.
pub struct TaskSet {
    words: Vec<Cell<u64>>,
    len: Cell<usize>,
}

impl TaskSet {
    /// An empty set for at least so many tasks.
    pub fn new(tasks: usize) -> Self {
        Self { words: vec![Cell::new(0); tasks.div_ceil(64)], len: Cell::new(0) }
    }

    /// How many words it has.
    pub fn words(&self) -> usize {
        self.words.len()
    }

    /// How many tasks are in it.
    pub fn len(&self) -> usize {
        self.len.get()
    }

    pub fn contains(&self, task: TaskIndex) -> bool {
        let (word, bit) = bit_of(task);
        self.words[word].get() & bit != 0
    }

    pub fn insert(&self, task: TaskIndex) {
        let (word, bit) = bit_of(task);
        self.insert_all(word, bit);
    }

    /// Adds the tasks of one word.
    pub fn insert_all(&self, word: usize, bits: u64) {
        let before = self.words[word].replace(self.words[word].get() | bits);
        self.len.set(self.len.get() + (bits & !before).count_ones() as usize);
    }

    /// Takes the first out.
    pub fn pop(&self) -> Option<TaskIndex> {
        if self.len() == 0 {
            return None;
        }
        let (i, word) = self.words.iter().enumerate().find(|(_, word)| word.get() != 0)?;
        let bits = word.get();
        word.set(bits & (bits - 1));
        self.len.set(self.len() - 1);
        Some(i * 64 + bits.trailing_zeros() as usize)
    }

    /// Takes all out.
    pub fn clear(&self) {
        self.words.iter().for_each(|word| word.set(0));
        self.len.set(0);
    }

    /// Moves all to another set, which must have as many words with tasks in them.
    pub fn move_to(&self, other: &Self) {
        if self.len.take() == 0 {
            return;
        }
        for (i, word) in self.words.iter().enumerate() {
            let bits = word.take();
            if bits != 0 {
                other.insert_all(i, bits);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::iter::from_fn;

    #[test]
    fn tasks_come_out_once_and_in_order() {
        let set = TaskSet::new(150);
        [149, 3, 64, 3, 0].into_iter().for_each(|task| set.insert(task));
        set.insert_all(1, 0b11);
        assert!(set.len() == 5 && set.contains(65) && !set.contains(1));
        assert_eq!((set.pop(), set.pop()), (Some(0), Some(3)));
        set.insert(2);
        assert_eq!(from_fn(|| set.pop()).collect::<Vec<_>>(), [2, 64, 65, 149]);
        assert_eq!((set.len(), set.pop()), (0, None));
    }

    #[test]
    fn all_move_to_another_set_and_meet_there() {
        let (set, other) = (TaskSet::new(150), TaskSet::new(70));
        [1, 69].into_iter().for_each(|task| set.insert(task));
        [1, 2].into_iter().for_each(|task| other.insert(task));
        set.move_to(&other);
        assert_eq!((set.len(), set.pop()), (0, None));
        assert_eq!(other.len(), 3);
        assert_eq!(from_fn(|| other.pop()).collect::<Vec<_>>(), [1, 2, 69]);
    }
}
