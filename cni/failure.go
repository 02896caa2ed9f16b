package cni

import (
	"errors"

	"code.cloudfoundry.org/silk/fault"
)

// Error codes of the CNI specification, section 5, and of its STATUS.
const (
	codeVersion     = 1
	codeUnsupported = 2
	codeUnknown     = 3 // container
	codeEnvironment = 4
	codeIO          = 5
	codeDecode      = 6
	codeConfig      = 7
	codeNetNS       = 8
	codeTryAgain    = 11
	codeUnavailable = 50
	codeLimited     = 51 // unavailable, and containers that exist may have limited connectivity
	codePlugin      = 100
)

// failure is an error as the runtime gets it.
type failure struct {
	code int
	msg  string // which step failed
	err  error  // why
	hint string // what a person can do
}

// Error returns message, cause and hint.
func (f *failure) Error() string {
	if d := f.details(); d != "" {
		return f.msg + "; " + d
	}
	return f.msg
}

// Unwrap returns the cause.
func (f *failure) Unwrap() error { return f.err }

func (f *failure) details() string {
	d := ""
	if f.err != nil {
		d = f.err.Error()
	}
	if f.hint != "" {
		if d != "" {
			d += "; "
		}
		d += "hint: " + f.hint
	}
	return d
}

// failed gives an error of another part the step that failed and a code by its kind.
func failed(msg string, err error) error {
	if f, ok := errors.AsType[*failure](err); ok {
		return f
	}
	f := &failure{code: codePlugin, msg: msg, err: err}
	switch fault.Of(err) {
	case fault.Invalid:
		f.code = codeConfig
	case fault.Exhausted, fault.Unavailable:
		f.code = codeTryAgain
	}
	return f
}

func failureOf(err error) *failure {
	f, _ := errors.AsType[*failure](failed("internal error", err))
	return f
}

// unavailable is the failure of a STATUS.
func unavailable(msg string, err error) *failure {
	return &failure{code: codeUnavailable, msg: msg, err: err}
}

// result is what is printed of a failure.
type errorResult struct {
	CNIVersion string `json:"cniVersion,omitempty"`
	Code       int    `json:"code"`
	Msg        string `json:"msg"`
	Details    string `json:"details,omitempty"`
}

func (f *failure) output(version string) errorResult {
	return errorResult{version, f.code, f.msg, f.details()}
}
