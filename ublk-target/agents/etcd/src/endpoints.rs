//! Where the members are. A name service may lie on the device that waits for this agent, so names
//! are looked up at start, and the members are asked by address. Their certificates are still those
//! of the names.

use crate::options::Files;
use etcd_client::{Certificate, Identity, TlsOptions};
use std::net::ToSocketAddrs;
use ublk_anchor_protocol::process::{Ended, configured};

/// One address of a member.
#[derive(Debug)]
pub(crate) struct Endpoint {
    /// With the address in the place of the name.
    pub(crate) url: String,
    /// How to speak to it, where that is by TLS.
    pub(crate) tls: Option<TlsOptions>,
}

/// All addresses of all members.
pub(crate) fn resolve(urls: &[String], files: &Files) -> Result<Vec<Endpoint>, Ended> {
    let tls = tls(files)?;
    let mut endpoints = Vec::new();
    for url in urls {
        let (secure, authority) = split(url)?;
        let (host, port) = host_and_port(url, authority)?;
        let addresses = (host, port).to_socket_addrs();
        let addresses: Vec<_> = addresses
            .map_err(|e| Ended { why: format!("--endpoint {url}: looking up {host}: {e}"), code: 4 })?
            .collect();
        if !secure && !addresses.iter().all(|address| address.ip().is_loopback()) {
            let why = format!(
                "--endpoint {url}: http is for this machine alone, for who is on the way could answer an old body; use https"
            );
            return Err(Ended::arguments(why));
        }
        for address in addresses {
            let scheme = if secure { "https" } else { "http" };
            let tls = secure.then(|| tls.clone().domain_name(host));
            endpoints.push(Endpoint { url: format!("{scheme}://{address}"), tls });
        }
    }
    Ok(endpoints)
}

fn split(url: &str) -> Result<(bool, &str), Ended> {
    let authority = url.strip_prefix("https://").map(|rest| (true, rest));
    let (secure, authority) =
        authority.or_else(|| url.strip_prefix("http://").map(|rest| (false, rest))).ok_or_else(|| {
            Ended::arguments(format!("--endpoint {url}: it begins with https:// (or http:// on this machine)"))
        })?;
    Ok((secure, authority.strip_suffix('/').unwrap_or(authority)))
}

/// `name:2379`, `192.0.2.1:2379` or `[2001:db8::1]:2379`; etcd's port if there is none.
fn host_and_port<'a>(url: &str, authority: &'a str) -> Result<(&'a str, u16), Ended> {
    let wrong = || {
        Ended::arguments(format!("--endpoint {url}: behind the scheme stand a host and a port, as etcd1.example:2379"))
    };
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => rest.split_once(']').ok_or_else(wrong)?,
        None => authority.find(':').map_or((authority, ""), |at| authority.split_at(at)),
    };
    let port = match port.strip_prefix(':') {
        Some(port) => port.parse().map_err(|_| wrong())?,
        None if port.is_empty() => 2379,
        None => return Err(wrong()),
    };
    if host.is_empty() || host.contains(['/', '@', '?', '#']) {
        return Err(wrong());
    }
    Ok((host, port))
}

fn tls(files: &Files) -> Result<TlsOptions, Ended> {
    let mut tls = TlsOptions::new();
    if let Some(path) = &files.ca {
        tls = tls.ca_certificate(Certificate::from_pem(configured("CA's certificate", path)?));
    }
    if let (Some(cert), Some(key)) = (&files.cert, &files.key) {
        tls = tls.identity(Identity::from_pem(configured("certificate", cert)?, configured("private key", key)?));
    }
    Ok(tls)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(url: &str) -> Result<Vec<String>, Ended> {
        resolve(&[url.to_owned()], &Files::default()).map(|found| found.into_iter().map(|one| one.url).collect())
    }

    #[test]
    fn a_member_is_asked_by_its_address() {
        assert_eq!(resolved("https://192.0.2.1:23790/").unwrap(), ["https://192.0.2.1:23790"]);
        assert_eq!(resolved("https://[2001:db8::1]").unwrap(), ["https://[2001:db8::1]:2379"]);
        assert_eq!(resolved("http://127.0.0.1").unwrap(), ["http://127.0.0.1:2379"]);
        let names = resolved("http://localhost:1").unwrap();
        assert!(names.iter().all(|url| url == "http://127.0.0.1:1" || url == "http://[::1]:1"), "{names:?}");
    }

    #[test]
    fn what_is_no_member_is_refused_with_its_name() {
        for wrong in [
            "etcd1:2379",
            "ftp://x",
            "https://",
            "https://:1",
            "https://a:b",
            "https://[::1",
            "https://[::1]2",
            "https://a:1/b",
            "https://u@a:1",
            "http://192.0.2.1:2379",
        ] {
            let ended = resolved(wrong).unwrap_err();
            assert!(ended.code == 1 && ended.why.contains(wrong), "{wrong}: {ended:?}");
        }
        assert_eq!(resolved("https://name.invalid:1").unwrap_err().code, 4);
    }
}
