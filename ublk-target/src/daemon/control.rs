//! The daemon's socket: whoever connects gets state and counters as one JSON value. Served by a thread
//! of its own; queue threads have no part in it.

use super::{state, workers::named};
use crate::failure::{Context, Exit, Failure, Outcome};
use serde_json::Value;
use std::{
    fs,
    io::{self, Read, Write},
    os::unix::{
        fs::PermissionsExt,
        net::{UnixListener, UnixStream},
    },
    time::Duration,
};

/// How long either side waits for the other.
const PATIENCE: Duration = Duration::from_secs(10);

/// Starts answering for device `id`.
pub fn serve(id: u32, status: impl Fn() -> Value + Send + 'static) -> io::Result<()> {
    let path = state::socket_path(id);
    let _ = fs::remove_file(&path);
    let listener = UnixListener::bind(&path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    named("control").spawn(move || {
        for client in listener.incoming().flatten() {
            // A client that misbehaves harms only itself.
            let _ = send(client, &status());
        }
    })?;
    Ok(())
}

fn send(mut client: UnixStream, status: &Value) -> io::Result<()> {
    client.set_write_timeout(Some(PATIENCE))?;
    client.write_all(status.to_string().as_bytes())
}

/// State and counters of device `id`, from its daemon.
pub fn status(id: u32) -> Outcome<Value> {
    let context = format!("can't reach the daemon of device {id}");
    let mut socket = UnixStream::connect(state::socket_path(id)).doing(&context)?;
    socket.set_read_timeout(Some(PATIENCE)).doing(&context)?;
    let mut text = String::new();
    socket.read_to_string(&mut text).doing(&context)?;
    serde_json::from_str(&text).map_err(|e| Failure::new(Exit::Device, format_args!("{context}: {e}")))
}
