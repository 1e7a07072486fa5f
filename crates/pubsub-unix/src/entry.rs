//! Who may enter: the user whose bus it is, root, and whoever else was admitted.

use nix::unistd::{Group, User, geteuid};

/// Whom a broker serves, and whose broker a client trusts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Entry {
    users: Vec<u32>,
    groups: Vec<u32>,
    owner: Option<u32>,
}

impl Entry {
    /// From names, or numbers as text.
    ///
    /// # Errors
    /// The option, and the name in it that nobody has.
    pub(crate) fn new(users: &[String], groups: &[String], owner: Option<&str>) -> Result<Self, (&'static str, String)> {
        let user = |name: &str| match name.parse() {
            Ok(number) => Some(number),
            Err(_) => User::from_name(name).ok().flatten().map(|user| user.uid.as_raw()),
        };
        let unknown = |what: &str, name: &str| format!("no {what} is called {}", name.escape_debug());
        let mut entry = Self::default();
        for name in users {
            entry.users.push(user(name).ok_or_else(|| ("allow_users", unknown("user", name)))?);
        }
        for name in groups {
            let group = match name.parse() {
                Ok(number) => Group::from_gid(nix::unistd::Gid::from_raw(number)).ok().flatten().ok_or(Some(number)),
                Err(_) => Group::from_name(name).ok().flatten().ok_or(None),
            };
            match group {
                // Credentials tell a process's first group only; those who are in this one by the system's list are admitted as users.
                Ok(group) => {
                    entry.groups.push(group.gid.as_raw());
                    entry.users.extend(group.mem.iter().filter_map(|name| user(name)));
                }
                Err(Some(number)) => entry.groups.push(number),
                Err(None) => return Err(("allow_groups", unknown("group", name))),
            }
        }
        if let Some(name) = owner {
            entry.owner = Some(user(name).ok_or_else(|| ("owner", unknown("user", name)))?);
        }
        Ok(entry)
    }

    /// Whether others than the owner and root are admitted.
    pub(crate) fn is_open(&self) -> bool {
        !self.users.is_empty() || !self.groups.is_empty()
    }

    /// Whether a process with these credentials is served.
    pub(crate) fn admits(&self, user: u32, group: u32) -> bool {
        user == geteuid().as_raw() || user == 0 || self.users.contains(&user) || self.groups.contains(&group)
    }

    /// Whose bus it is, if it is another's: then this process is never its broker.
    pub(crate) fn host(&self) -> Option<u32> {
        self.owner.filter(|owner| *owner != geteuid().as_raw())
    }

    /// Whether what belongs to this user is what it should be: one's own, root's, or that of the bus's owner.
    pub(crate) fn trusts(&self, user: u32) -> bool {
        user == geteuid().as_raw() || user == 0 || self.owner == Some(user)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_admitted_and_unknown_ones_told() {
        let entry = Entry::new(&["4711".into()], &["4712".into()], None).unwrap();
        assert!(entry.is_open() && entry.admits(4711, 1) && entry.admits(1, 4712) && !entry.admits(4712, 4711));
        assert!(entry.admits(geteuid().as_raw(), 1) && entry.admits(0, 1));
        assert!(!Entry::default().is_open() && !Entry::default().admits(4711, 4712));
        let root = Entry::new(&["root".into()], &[], Some("root")).unwrap();
        assert!(root.trusts(0) && !root.trusts(4711));
        let unknown = |users: &[String], groups: &[String], owner| Entry::new(users, groups, owner).unwrap_err().0;
        assert_eq!(unknown(&["no such user".into()], &[], None), "allow_users");
        assert_eq!(unknown(&[], &["no such group".into()], None), "allow_groups");
        assert_eq!(unknown(&[], &[], Some("no such user")), "owner");
    }
}
