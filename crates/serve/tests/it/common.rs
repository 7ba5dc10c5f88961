//! A server with everything off that can be off.

use std::sync::Arc;

use draftsmith_core::VerifyRule;
use draftsmith_serve::{Limits, Options};

pub(crate) fn options(address: &str, limits: Limits) -> Options {
    Options {
        addresses: vec![address.parse().unwrap()],
        api_keys: Vec::new(),
        admin_key: None,
        allow_origins: Vec::new(),
        limits,
        records: None,
        runs: None,
        keep_generations: 0,
        verify: VerifyRule::Seeded,
        plan: None,
        tool_format: None,
        log: Arc::new(|_| {}),
        request_log: None,
    }
}
