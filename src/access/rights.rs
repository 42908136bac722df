//! What an identity may do, and as which tenant.

use std::fmt;

use crate::ids::TenantId;

/// What a call may need.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Permission {
    /// Requests to the base and to deltas.
    Infer,
    /// Datasets and training jobs.
    Train,
    /// Uploading, moving, merging, downloading and deleting deltas.
    Manage,
    /// What concerns other tenants or the server as a whole.
    Admin,
}

impl Permission {
    /// Every permission.
    pub const ALL: [Self; 4] = [Self::Infer, Self::Train, Self::Manage, Self::Admin];

    /// As files, tokens and flags name it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Infer => "infer",
            Self::Train => "train",
            Self::Manage => "manage",
            Self::Admin => "admin",
        }
    }

    /// The permission of a name.
    pub fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|permission| permission.name() == name)
    }
}

/// A set of permissions. None implies another.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Permissions(u8);

impl Permissions {
    /// Every permission.
    pub const ALL: Self = Self(0b1111);

    /// Whether it is in the set.
    pub const fn has(self, permission: Permission) -> bool {
        self.0 & (1 << permission as u8) != 0
    }

    /// The set with one more.
    pub const fn with(self, permission: Permission) -> Self {
        Self(self.0 | 1 << permission as u8)
    }

    /// Whether nothing is in it.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// As which tenant an identity may call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tenancy {
    /// As any that the call names.
    Any,
    /// As this one.
    One(TenantId),
}

/// Somebody who proved who they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// For logs: the kind of credential and its name, such as `key:ci`. Never a secret.
    pub name: String,
    /// As which tenant they may call.
    pub tenancy: Tenancy,
    /// What they may do.
    pub permissions: Permissions,
}

impl Identity {
    /// Whoever calls a server that asks for no credentials.
    pub fn anyone() -> Self {
        Self { name: "anyone".into(), tenancy: Tenancy::Any, permissions: Permissions::ALL }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// How a tenant that stands for all is written.
const ANY_TENANT: &str = "*";

/// Tenant and permissions of an entry of a file.
///
/// # Errors
/// Which of the two is wrong, and what is accepted.
pub(super) fn read(tenant: &str, permissions: &[String]) -> Result<(Tenancy, Permissions), String> {
    let mut set = Permissions::default();
    for name in permissions {
        let accepted = Permission::ALL.map(Permission::name).join(", ");
        let permission =
            Permission::of(name).ok_or_else(|| format!("permissions: {name:?} is unknown; accepted are {accepted}"))?;
        set = set.with(permission);
    }
    if set.is_empty() {
        return Err("permissions: is empty; one at least is needed".into());
    }
    Ok((tenancy(tenant, set)?, set))
}

/// The tenancy that a tenant's name means beside these permissions: `*` takes `admin`.
///
/// # Errors
/// What is wrong with it.
pub(super) fn tenancy(tenant: &str, permissions: Permissions) -> Result<Tenancy, String> {
    if tenant != ANY_TENANT {
        return TenantId::new(tenant).map(Tenancy::One).map_err(|e| format!("tenant: {e}; or \"*\" for all"));
    }
    match permissions.has(Permission::Admin) {
        true => Ok(Tenancy::Any),
        false => Err("tenant: \"*\" is only for identities with the permission admin".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rights(tenant: &str, permissions: &[&str]) -> Result<(Tenancy, Permissions), String> {
        read(tenant, &permissions.iter().map(|&p| p.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn a_set_has_what_was_put_into_it_and_nothing_else() {
        for one in Permission::ALL {
            let set = Permissions::default().with(one);
            assert!(Permission::ALL.into_iter().all(|p| set.has(p) == (p == one)), "{set:?}");
            assert!(Permissions::ALL.has(one) && Permission::of(one.name()) == Some(one));
        }
        assert_eq!(Permission::ALL.into_iter().fold(Permissions::default(), Permissions::with), Permissions::ALL);
    }

    #[test]
    fn any_tenant_takes_admin_and_unknown_permissions_are_refused() {
        let acme = TenantId::new("acme").map(Tenancy::One).ok();
        assert_eq!(rights("acme", &["infer", "train"]).ok().map(|(tenancy, _)| tenancy), acme);
        assert_eq!(rights("*", &["admin", "infer"]).ok().map(|(tenancy, _)| tenancy), Some(Tenancy::Any));
        let refused = |tenant: &str, permissions: &[&str]| rights(tenant, permissions).err().unwrap_or_default();
        assert!(refused("*", &["infer"]).starts_with("tenant:"));
        assert!(refused("../x", &["infer"]).starts_with("tenant:"));
        assert!(refused("acme", &[]).starts_with("permissions:"));
        assert!(refused("acme", &["infer", "root"]).contains("accepted are infer, train, manage, admin"));
    }
}
