//! Both databases have the same migrations.

use super::format::{FORMAT, POSTGRES, SQLITE};

#[test]
fn both_databases_have_the_same_migrations_and_the_last_is_the_format() {
    let of = |migrator: &sqlx::migrate::Migrator| {
        migrator.iter().map(|m| (m.version, m.description.to_string())).collect::<Vec<_>>()
    };
    let (sqlite, postgres) = (of(&SQLITE), of(&POSTGRES));
    assert_eq!(sqlite, postgres);
    assert_eq!(sqlite.last().map(|(version, _)| *version), i64::try_from(FORMAT).ok());
    for (version, _) in sqlite.iter().filter(|(version, _)| *version > 3) {
        // each newer one says so in the row that is read before anything else is touched
        let says = |migrator: &sqlx::migrate::Migrator| {
            let migration = migrator.iter().find(|m| m.version == *version).unwrap();
            let sql = migration.sql.as_str();
            sql.contains("'format'") && sql.contains(&format!("'{version}'"))
        };
        assert!(says(&SQLITE) && says(&POSTGRES), "migration {version} does not set the format");
    }
}
