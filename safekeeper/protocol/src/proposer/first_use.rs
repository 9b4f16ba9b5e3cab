//! The first configuration of a cluster, and which configuration to go by.
//!
//! It is written in two rounds, *provisional* on every listed safekeeper and then *confirmed* on
//! every one, so that two servers with different lists that share a safekeeper can't both finish.

use super::*;

impl Proposer {
    /// Of the configurations of our lineage (that of the one we know, or else the only one there
    /// is) the latest that could elect us by what the greetings show; without such a one the latest.
    ///
    /// Not simply the latest: a change that was begun and reached a minority must not keep a
    /// majority from electing that never heard of it. If a later one was decided, a majority of
    /// those who decided before it knows it, and refuses. A provisional one that we know binds
    /// nobody but those who hold it.
    pub(super) fn adopt_configuration(&mut self) -> Result<(), WaitReason> {
        let known = !self.configuration.is_none() && !self.configuration.is_provisional();
        let mut choices: Vec<Configuration> = Vec::new();
        if known {
            choices.push(self.configuration.clone());
        }
        let greetings = self.links.iter().flatten();
        for greeting in greetings.filter_map(|link| link.greeting.as_ref()) {
            let theirs = &greeting.configuration;
            if theirs.is_none() {
                continue;
            }
            match choices.first() {
                Some(first) if first.lineage != theirs.lineage => {
                    if known {
                        continue;
                    }
                    return Err(WaitReason::Membership(format!(
                        "safekeeper {} holds configuration {theirs}, another one holds {first}: they were \
                         first configured by different servers; remove the stranger from the list",
                        greeting.member_id
                    )));
                }
                _ => choices.push(theirs.clone()),
            }
        }
        choices.sort_by_key(|choice| core::cmp::Reverse(choice.version));
        let electing = choices
            .iter()
            .find(|choice| self.could_be_elected_by(choice));
        self.configuration = electing.or(choices.first()).cloned().unwrap_or_default();
        Ok(())
    }

    /// A quorum of it has greeted, and knows no later one.
    fn could_be_elected_by(&self, choice: &Configuration) -> bool {
        let greetings = || {
            let links = self.links.iter().flatten();
            links.filter_map(|link| link.greeting.as_ref())
        };
        choice.has_quorum(|member| {
            greetings().any(|greeting| {
                let theirs = &greeting.configuration;
                greeting.is_of(member)
                    && theirs.lineage == choice.lineage
                    && theirs.version <= choice.version
            })
        })
    }

    /// First use: every listed safekeeper, each once, and none bound to another list.
    pub(super) fn first_configuration(&self) -> Result<Configuration, WaitReason> {
        let mut members: Vec<Member> = Vec::new();
        let mut missing = Vec::new();
        let mut highest = Term::NONE;
        for (address, link) in self.settings.peers.iter().zip(&self.links) {
            let Some(greeting) = link.as_ref().and_then(|link| link.greeting.as_ref()) else {
                missing.push(address.clone());
                continue;
            };
            if let Some(twin) = members
                .iter()
                .find(|member| member.id == greeting.member_id)
            {
                return Err(WaitReason::Membership(format!(
                    "{address} and {}:{} are both safekeeper {}: each needs an id of its own",
                    twin.host, twin.port, twin.id
                )));
            }
            highest = highest.max(greeting.term);
            members.push(Member {
                id: greeting.member_id,
                incarnation: greeting.incarnation,
                host: address.host.clone(),
                port: address.port,
            });
        }
        if !missing.is_empty() {
            return Err(WaitReason::FirstUse { missing });
        }
        if members.len() > Configuration::MEMBERS_MAX {
            return Err(WaitReason::Membership(format!(
                "{} safekeepers are listed, at most {} are supported",
                members.len(),
                Configuration::MEMBERS_MAX
            )));
        }
        let Some(term) = highest.next() else {
            return Err(WaitReason::Membership(
                "a safekeeper is at the end of terms".to_string(),
            ));
        };
        let version = ConfigurationVersion {
            term,
            generation: ConfigurationVersion::PROVISIONAL,
        };
        let begun = self.configuration.is_provisional();
        let ours = Configuration {
            lineage: if begun {
                self.configuration.lineage
            } else {
                self.lineage
            },
            version,
            members,
            new_members: None,
        };
        if begun && !ours.same_members(&self.configuration) {
            return Err(WaitReason::Membership(format!(
                "a first configuration {} was begun with other safekeepers than the list names: restore \
                 the list, or make those safekeepers anew with `safekeeper init`",
                self.configuration
            )));
        }
        Ok(ours)
    }

    pub(super) fn configure_all(
        &mut self,
        configuration: Configuration,
        now_ms: u64,
        out: &mut Actions,
    ) {
        let term = configuration.version.term;
        for peer in self.peer_indexes() {
            self.send_configure(peer, term, &configuration, now_ms, out);
        }
        let deadline_ms = now_ms + self.settings.member_timeout_ms;
        self.phase = Phase::Configuring {
            term,
            configuration,
            deadline_ms,
        };
    }

    pub(super) fn on_configure_response(
        &mut self,
        peer: PeerIdx,
        response: &ConfigureResponse,
        now_ms: u64,
        out: &mut Actions,
    ) {
        let held = response.configuration.version;
        if let Some(link) = &mut self.links[peer.0] {
            link.configured = Some(held);
            link.configure_due = false;
            link.term = response.term;
            if let Some(greeting) = &mut link.greeting {
                greeting.term = response.term;
                greeting.configuration = response.configuration.clone();
            }
        }
        match &self.phase {
            Phase::Leading | Phase::Promoting(_) => self.welcome(peer, now_ms, out),
            Phase::Configuring {
                term,
                configuration,
                ..
            } => {
                if response.term > *term || held > configuration.version {
                    return self.pause(now_ms);
                }
                let (term, configuration) = (*term, configuration.clone());
                self.advance_configuring(term, configuration, now_ms, out);
            }
            _ => {}
        }
    }

    /// Provisional on every member, then confirmed on every member: two proposers with different
    /// lists that share a safekeeper can't both get past the first step.
    pub(super) fn advance_configuring(
        &mut self,
        term: Term,
        configuration: Configuration,
        now_ms: u64,
        out: &mut Actions,
    ) {
        let on_all = self.links.iter().all(|link| {
            link.as_ref()
                .is_some_and(|link| link.configured == Some(configuration.version))
        });
        if !on_all {
            return;
        }
        if configuration.is_provisional() {
            let version = ConfigurationVersion {
                term,
                generation: 1,
            };
            self.configure_all(
                Configuration {
                    version,
                    ..configuration
                },
                now_ms,
                out,
            );
        } else {
            self.configuration = configuration;
            self.ask_for_votes(now_ms, out);
        }
    }
}
