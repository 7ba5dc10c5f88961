//! What a server of answers needs from outside: leave to use the network, and its key.

use draftsmith_formats::run::ServerTable;

use crate::Error;
use crate::pull::Places;

/// The key from the variable that the table names, if it names one.
///
/// # Errors
/// The network is switched off and the server is elsewhere, or the variable is not set.
pub fn server_key(
    server: &ServerTable,
    places: &Places,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<Option<String>, Error> {
    if places.offline && !server.is_local() {
        return Err(Error::input(
            format!("`{}` is elsewhere, but the network is switched off", server.url),
            "leave `--offline` (or HF_HUB_OFFLINE) out, or use a server on this machine",
        ));
    }
    let Some(name) = &server.key_env else { return Ok(None) };
    match variable(name).filter(|key| !key.trim().is_empty()) {
        Some(key) => Ok(Some(key.trim().to_string())),
        None => Err(Error::input(
            format!("the key of `{}` is to be in the variable `{name}`, which is not set", server.url),
            format!("set it: `export {name}=…`"),
        )),
    }
}
