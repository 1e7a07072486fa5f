//! What is in consumers' hands, by token.

/// A slab whose tokens are never mistaken for each other: a removed entry's token stays dead although its slot is reused.
#[derive(Debug)]
pub struct InFlight<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    /// Generation that new slots start with.
    start: u32,
}

#[derive(Debug)]
struct Slot<T> {
    /// Counts the slot's uses; the upper half of its tokens.
    generation: u32,
    value: Option<T>,
}

impl<T> Default for InFlight<T> {
    fn default() -> Self {
        Self { slots: Vec::new(), free: Vec::new(), start: 0 }
    }
}

impl<T> InFlight<T> {
    /// An empty slab.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds an entry and returns its token.
    ///
    /// # Panics
    /// Beyond 2^32 entries.
    pub fn insert(&mut self, value: T) -> u64 {
        if self.slots.is_empty() {
            self.slots.reserve_exact(1); // many hold one entry for life
        }
        let place = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: self.start, value: None });
            u32::try_from(self.slots.len() - 1).expect("fewer than 2^32 in flight")
        });
        let slot = &mut self.slots[place as usize];
        slot.value = Some(value);
        u64::from(slot.generation) << 32 | u64::from(place)
    }

    /// The entry of a token, if it is still there.
    pub fn get(&self, token: u64) -> Option<&T> {
        self.slots.get(place(token)).filter(|slot| slot.generation == generation(token))?.value.as_ref()
    }

    /// The entry of a token, if it is still there.
    pub fn get_mut(&mut self, token: u64) -> Option<&mut T> {
        self.slots.get_mut(place(token)).filter(|slot| slot.generation == generation(token))?.value.as_mut()
    }

    /// Removes the entry of a token, if it is still there.
    pub fn remove(&mut self, token: u64) -> Option<T> {
        let slot = self.slots.get_mut(place(token)).filter(|slot| slot.generation == generation(token))?;
        let value = slot.value.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(token as u32);
        if self.free.len() == self.slots.len() && self.slots.len() > 1024 {
            self.shrink();
        }
        Some(value)
    }

    /// All entries with their tokens, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &T)> {
        self.slots.iter().enumerate().filter_map(|(place, slot)| {
            let token = u64::from(slot.generation) << 32 | place as u64;
            slot.value.as_ref().map(|value| (token, value))
        })
    }

    /// Gives back the memory of a burst once nothing of it is left. New slots go on from the highest generation, so that old
    /// tokens stay dead.
    fn shrink(&mut self) {
        self.start = self.slots.iter().map(|slot| slot.generation).max().unwrap_or(self.start);
        self.slots = Vec::new();
        self.free = Vec::new();
    }
}

fn place(token: u64) -> usize {
    token as u32 as usize
}

fn generation(token: u64) -> u32 {
    (token >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_token_stays_dead() {
        let mut slab = InFlight::new();
        let a = slab.insert('a');
        assert_eq!(slab.remove(a), Some('a'));
        let b = slab.insert('b');
        assert_ne!(a, b);
        assert_eq!(slab.remove(a), None);
        assert_eq!((slab.get(a), slab.get(b), slab.len()), (None, Some(&'b'), 1));
    }

    #[test]
    fn a_burst_gives_its_memory_back() {
        let mut slab = InFlight::new();
        let tokens: Vec<_> = (0..5000).map(|i| slab.insert(i)).collect();
        assert_eq!(slab.iter().count(), 5000);
        for token in &tokens {
            assert!(slab.remove(*token).is_some());
        }
        assert!(slab.is_empty() && slab.slots.capacity() == 0);
        let again: Vec<_> = (0..5000).map(|i| slab.insert(i)).collect();
        assert!(tokens.iter().all(|token| slab.get(*token).is_none() && !again.contains(token)));
    }
}
