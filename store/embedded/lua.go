package embedded

import (
	"crypto/sha1"
	"encoding/hex"
	"errors"
	"strconv"
	"strings"
	"sync"

	lua "github.com/yuin/gopher-lua"
	"github.com/yuin/gopher-lua/parse"
)

// script is a compiled Lua program.
type script struct {
	*lua.FunctionProto
	sparing bool // frees space, or takes little: it also runs when hardly any is left
}

// compiled holds scripts by their texts, shared by all Redises of this process.
var compiled sync.Map

func compile(text string) (script, error) {
	if s, ok := compiled.Load(text); ok {
		return s.(script), nil
	}
	s, program := script{}, text
	if flags, rest, ok := strings.Cut(text, "\n"); ok && strings.HasPrefix(flags, "#!lua") {
		s.sparing, program = strings.Contains(flags, "allow-oom"), "\n"+rest
	}
	chunk, err := parse.Parse(strings.NewReader(program), "script")
	if err != nil {
		return s, err
	}
	if s.FunctionProto, err = lua.Compile(chunk, "script"); err != nil {
		return s, err
	}
	compiled.Store(text, s)
	return s, nil
}

func eval(r *Redis, args []string) lua.LValue {
	s, err := compile(args[1])
	if err != nil {
		return failure("ERR Error compiling script: %s", oneLine(err.Error()))
	}
	r.scripts[sha1Hex(args[1])] = s
	return r.runScript(s, args[2:])
}

func evalSHA(r *Redis, args []string) lua.LValue {
	s, ok := r.scripts[args[1]]
	if !ok {
		return failure("NOSCRIPT No matching script. Please use EVAL.")
	}
	return r.runScript(s, args[2:])
}

// sparing reports whether all commands are scripts that also run when hardly any space is left.
func (r *Redis) sparing(commands [][]string) bool {
	for _, args := range commands {
		if len(args) < 2 {
			return false
		}
		s := r.scripts[args[1]]
		if strings.EqualFold(args[0], "EVAL") {
			s.sparing = strings.HasPrefix(args[1], "#!lua flags=allow-oom\n")
		}
		if !s.sparing {
			return false
		}
	}
	return true
}

// runScript runs a script. args are the number of keys, the keys, and the other arguments.
func (r *Redis) runScript(s script, args []string) lua.LValue {
	n, err := strconv.Atoi(args[0])
	if err != nil || n < 0 || n > len(args)-1 {
		return failure("ERR Number of keys can't be greater than number of args")
	}
	l := r.lua
	defer l.SetTop(0)
	l.SetGlobal("KEYS", r.texts(args[1:1+n]))
	l.SetGlobal("ARGV", r.texts(args[1+n:]))
	l.Push(l.NewFunctionFromProto(s.FunctionProto))
	if err := l.PCall(0, 1, nil); err != nil {
		if failed := (*lua.ApiError)(nil); errors.As(err, &failed) {
			if t, ok := failed.Object.(*lua.LTable); ok {
				return t
			}
			return failure("ERR Error running script: %s", oneLine(lua.LVAsString(failed.Object)))
		}
		return failure("ERR Error running script: %s", oneLine(err.Error()))
	}
	return l.Get(1)
}

func oneLine(text string) string { return strings.NewReplacer("\r", " ", "\n", " ").Replace(text) }

func sha1Hex(text string) string {
	sum := sha1.Sum([]byte(text))
	return hex.EncodeToString(sum[:])
}

// newState makes the state in which all scripts run. It provides those functions of Redis's that our scripts use.
func (r *Redis) newState() *lua.LState {
	l := lua.NewState(lua.Options{SkipOpenLibs: true, RegistrySize: 16 << 10, RegistryMaxSize: 1 << 20, CallStackSize: 200})
	for _, lib := range []struct {
		name string
		open lua.LGFunction
	}{{lua.BaseLibName, lua.OpenBase}, {lua.TabLibName, lua.OpenTable}, {lua.StringLibName, lua.OpenString}, {lua.MathLibName, lua.OpenMath}} {
		l.Push(l.NewFunction(lib.open))
		l.Push(lua.LString(lib.name))
		l.Call(1, 0)
	}
	// Half of what the scripts format is whole numbers, so they take a fast path.
	library := l.GetGlobal("string").(*lua.LTable)
	formatAll := library.RawGetString("format").(*lua.LFunction).GFunction
	library.RawSetString("format", l.NewFunction(func(l *lua.LState) int {
		if n, ok := l.Get(2).(lua.LNumber); ok && l.Get(1) == wholeNumber && n == lua.LNumber(int64(n)) {
			l.Push(lua.LString(strconv.FormatInt(int64(n), 10)))
			return 1
		}
		return formatAll(l)
	}))
	call := func(protected bool) lua.LGFunction {
		return func(l *lua.LState) int {
			args := r.args[:0]
			for i := range l.GetTop() {
				switch v := l.Get(i + 1).(type) {
				case lua.LString:
					args = append(args, string(v))
				case lua.LNumber:
					args = append(args, number(v))
				default:
					l.RaiseError("Lua redis lib command arguments must be strings or integers")
				}
			}
			r.args = args
			if len(args) == 0 {
				l.RaiseError("Please specify at least one argument for this redis.call() call")
			}
			reply := r.run(args, true)
			if t, ok := reply.(*lua.LTable); ok && !protected && t.RawGetString("err") != lua.LNil {
				l.Error(t, 0)
			}
			l.Push(reply)
			return 1
		}
	}
	l.SetGlobal("redis", l.SetFuncs(l.NewTable(), map[string]lua.LGFunction{
		"call": call(false), "pcall": call(true),
		"sha1hex": func(l *lua.LState) int {
			l.Push(lua.LString(sha1Hex(l.CheckString(1))))
			return 1
		},
		"error_reply": func(l *lua.LState) int {
			l.Push(failure("%s", l.CheckString(1)))
			return 1
		},
	}))
	l.SetGlobal("cjson", l.SetFuncs(l.NewTable(), map[string]lua.LGFunction{
		"encode": func(l *lua.LState) int {
			l.Push(lua.LString(quote(l.CheckString(1))))
			return 1
		},
		"decode": func(l *lua.LState) int {
			v, err := decode(l, l.CheckString(1))
			if err != nil {
				l.RaiseError("%v", err)
			}
			l.Push(v)
			return 1
		},
	}))
	return l
}

const wholeNumber = lua.LString("%.0f")

// number formats a Lua number as Redis passes it to a command.
func number(n lua.LNumber) string {
	if i := int64(n); lua.LNumber(i) == n {
		return strconv.FormatInt(i, 10)
	}
	return strconv.FormatFloat(float64(n), 'g', 17, 64)
}
