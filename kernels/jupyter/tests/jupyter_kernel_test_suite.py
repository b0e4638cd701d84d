#!/usr/bin/env python3
"""Jupyter's own tests of a kernel (jupyter_kernel_test), all that apply to a kernel without comms of its own.

    jupyter_kernel_test_suite.py      with the Python of an environment in which the kernel "rust" is installed
"""

import unittest

import jupyter_kernel_test as jkt

GPU = 'tunebook::plan::Gpu::preset("t4")?'


class Kernel(jkt.KernelTests):
    kernel_name = "rust"
    language_name = "rust"
    file_extension = ".rs"
    code_hello_world = 'println!("hello, world")'
    code_stderr = 'eprintln!("oops")'
    code_page_something = None  # no pager
    complete_code_samples = ["1", "let a = 1;", 'println!("hello")', "fn f() -> u8 { 1 }"]
    incomplete_code_samples = ["fn f() {", 'println!("hello', "let a = ", "(1 +"]
    invalid_code_samples = [")", "let = 1;", "fn (]"]
    completion_samples = [{"text": "let v = String::new(); v.into_boxed_s", "matches": {"into_boxed_str"}}]
    code_generate_error = 'panic!("on purpose")'
    code_execute_result = [{"code": "6 * 7", "result": "42"}, {"code": '"a".to_owned()', "result": '"a"'}]
    code_display_data = [
        {"code": f"{GPU}.evcxr_display();", "mime": "text/html"},
        {"code": f"{GPU}.evcxr_display();", "mime": "text/plain"},
    ]
    code_history_pattern = "6 ?*"
    supported_history_operations = ("tail", "range", "search")
    code_inspect_sample = "String::new"
    code_clear_output = "tunebook::display::clear_output(false);"

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        # What a kernel says when it starts is no test's.
        cls.kc.execute_interactive("", silent=True, timeout=600)


class Welcome(jkt.IopubWelcomeTests):
    kernel_name = "rust"
    support_iopub_welcome = True


if __name__ == "__main__":
    unittest.main()
