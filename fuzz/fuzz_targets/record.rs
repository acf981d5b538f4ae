#![no_main]

libfuzzer_sys::fuzz_target!(|script: &[u8]| {
    ublk_integrity_fuzz::Target::Record.run(script);
});
