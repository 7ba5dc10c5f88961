//! How other engines are started with a draft, as model cards and exports tell it. The commands themselves stand with
//! each kind's layouts.

use serde::Serialize;

use crate::manifest::TargetInfo;

/// A command of another engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Launch {
    /// Which engine.
    pub engine: &'static str,
    /// Shell lines.
    pub command: String,
}

/// What the target is called by other engines.
pub(crate) fn engine_name(target: &TargetInfo) -> &str {
    target.hub_name.as_deref().unwrap_or("TARGET")
}
