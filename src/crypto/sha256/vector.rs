//! The compression function with vectors for words: a message in each 32-bit lane of every register.
//!
//! This is the textbook function (FIPS 180-4, 6.2.2). There is nothing to wait for between lanes,
//! so a processor without SHA instructions is busy all the time. Each set of instructions brings
//! its vector and what is done with it: `load_words` (the sixteen words of a block of each
//! message), `load`, `store`, `splat`, `add`, `xor`, `choose`, `majority`, `rotate` and `shift`.

/// Sixteen rounds, one after the other in the code: as a loop they would move all of the state from
/// register to register in each.
macro_rules! each_round {
    ($state:expr, $w:ident, $k:expr, $word:expr) => {
        $crate::crypto::sha256::vector::each_round!(@ $state, $w, $k, $word, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (@ $state:expr, $w:ident, $k:expr, $word:expr, $($i:literal)*) => {{
        let (mut state, k) = ($state, $k);
        $(
            let word = $word(&mut $w, $i);
            state = one_round(state, add(word, splat(k[$i / 4][$i % 4])));
        )*
        state
    }};
}
pub(super) use each_round;

/// All that is the same for each set of instructions: `$token` proves that the
/// processor has `$feature`.
macro_rules! compression {
    ($token:ident, $feature:tt, $vector:ty, $lanes:literal) => {
        /// Messages at a time.
        pub(super) const LANES: usize = $lanes;

        /// The same word of each message.
        type Words = [u32; LANES];

        /// Proof that this processor has the instructions.
        #[derive(Clone, Copy, Debug)]
        pub(crate) struct $token(());

        impl $token {
            pub(super) fn detect() -> Option<Self> {
                is_x86_feature_detected!($feature).then_some(Self(()))
            }

            /// See [`Engine::compress`](super::Engine::compress); for at most [`LANES`] messages.
            /// Lanes without one repeat the last, which costs nothing.
            pub(super) fn compress(self, states: &mut [State], messages: &[&[Block]], last: &[Block]) {
                let (count, blocks) = (states.len(), messages[0].len());
                let one_each = (1..=LANES).contains(&count) && messages.len() == count && last.len() == count;
                assert!(one_each, "at most one a lane");
                assert!(messages.iter().all(|m| m.len() == blocks), "messages of one length");
                let message = |lane: usize| lane.min(count - 1);
                let mut lanes: [State; LANES] = from_fn(|lane| states[message(lane)]);
                // SAFETY: there is such a token only where `detect` has found the feature.
                unsafe {
                    compress(&mut lanes, from_fn(|lane| messages[message(lane)]), from_fn(|lane| &last[message(lane)]))
                }
                states.copy_from_slice(&lanes[..count]);
            }
        }

        /// # Safety
        /// The processor has the feature.
        #[target_feature(enable = $feature)]
        unsafe fn compress(states: &mut [State; LANES], messages: [&[Block]; LANES], last: [&Block; LANES]) {
            // SAFETY: the feature is the caller's word.
            unsafe {
                let mut state = [splat(0); 8];
                for (word, vector) in state.iter_mut().enumerate() {
                    *vector = load(&states.map(|state| state[word]));
                }
                for block in 0..=messages[0].len() {
                    let mut w = load_words(&from_fn(|lane| messages[lane].get(block).unwrap_or(last[lane])));
                    let before = state;
                    state = each_round!(state, w, &K[..4], |w: &mut [$vector; 16], i: usize| w[i]);
                    for k in K[4..].chunks_exact(4) {
                        state = each_round!(state, w, k, next_word);
                    }
                    for (word, before) in state.iter_mut().zip(before) {
                        *word = add(*word, before);
                    }
                }
                for (word, vector) in state.into_iter().enumerate() {
                    for (state, value) in states.iter_mut().zip(store(vector)) {
                        state[word] = value;
                    }
                }
            }
        }

        /// One round on the sum of its word and its constant.
        ///
        /// # Safety
        /// The processor has the feature.
        #[inline]
        #[target_feature(enable = $feature)]
        unsafe fn one_round([a, b, c, d, e, f, g, h]: [$vector; 8], wk: $vector) -> [$vector; 8] {
            // SAFETY: the feature is the caller's word; no pointer is used here.
            unsafe {
                let sum1 = xor(rotate::<6, 26>(e), rotate::<11, 21>(e), rotate::<25, 7>(e));
                let t1 = add(add(h, wk), add(sum1, choose(e, f, g)));
                let sum0 = xor(rotate::<2, 30>(a), rotate::<13, 19>(a), rotate::<22, 10>(a));
                [add(t1, add(sum0, majority(a, b, c))), a, b, c, add(d, t1), e, f, g]
            }
        }

        /// The word of the schedule for a round from the 17th on, from the sixteen before it, the
        /// oldest of which it replaces.
        ///
        /// # Safety
        /// The processor has the feature.
        #[inline]
        #[target_feature(enable = $feature)]
        unsafe fn next_word(w: &mut [$vector; 16], round: usize) -> $vector {
            // SAFETY: the feature is the caller's word; no pointer is used here.
            unsafe {
                let (w15, w2) = (w[(round + 1) % 16], w[(round + 14) % 16]);
                let sigma0 = xor(rotate::<7, 25>(w15), rotate::<18, 14>(w15), shift::<3>(w15));
                let sigma1 = xor(rotate::<17, 15>(w2), rotate::<19, 13>(w2), shift::<10>(w2));
                w[round] = add(add(w[round], sigma0), add(w[(round + 9) % 16], sigma1));
                w[round]
            }
        }
    };
}
pub(super) use compression;
