//! Who is calling beside the tenant: what a layer that authenticates puts into a request's extensions, for those behind it.

use tonic::codegen::http::Extensions;

use crate::ids::TenantId;

/// A caller. Without a layer that says otherwise, nothing is known of it and it may manage its own tenant only.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Caller {
    /// Which credential it showed, by an id that is no secret.
    pub id: Option<String>,
    /// Whether it may manage all tenants.
    pub admin: bool,
}

impl Caller {
    /// What is known of a request's caller.
    pub(super) fn of(extensions: &Extensions) -> Self {
        extensions.get::<Self>().cloned().unwrap_or_default()
    }

    /// Whether it may manage the tenant that is named, calling as its own.
    pub(super) fn may_manage(&self, own: &TenantId, named: &TenantId) -> bool {
        own == named || self.admin
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caller_manages_its_own_tenant_and_others_only_if_it_may() {
        let (a, b) = (TenantId::new("a").unwrap(), TenantId::new("b").unwrap());
        let mut extensions = Extensions::default();
        let nobody = Caller::of(&extensions);
        assert_eq!(nobody, Caller::default());
        assert!(nobody.may_manage(&a, &a) && !nobody.may_manage(&a, &b));
        extensions.insert(Caller { id: Some("key-1".into()), admin: true });
        let admin = Caller::of(&extensions);
        assert!(admin.may_manage(&a, &b) && admin.id.as_deref() == Some("key-1"));
    }
}
