// Package lint holds the files of deploy/ that cannot be run in the tests against their tools' own code: what a
// cluster's API takes, what Compose loads, what Docker parses, what systemd and Prometheus say. It is a module of
// its own, so that the server does not depend on any of that.
package lint

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/types"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
	networking "k8s.io/api/networking/v1"
	policy "k8s.io/api/policy/v1"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"
)

const root = "../.."

// objects is what kubectl apply -k sends, by kind. A name that the API does not know is an error.
func objects(t *testing.T) map[string]any {
	t.Helper()
	built, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), filepath.Join(root, "deploy/kubernetes"))
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]any{}
	for _, r := range built.Resources() {
		into := map[string]any{
			"Deployment": &apps.Deployment{}, "Service": &core.Service{}, "PodDisruptionBudget": &policy.PodDisruptionBudget{},
			"NetworkPolicy": &networking.NetworkPolicy{}, "Ingress": &networking.Ingress{},
		}[r.GetKind()]
		text, err := r.AsYAML()
		if err != nil {
			t.Fatal(err)
		}
		if into == nil {
			t.Fatalf("an unknown kind: %s", r.GetKind())
		}
		if err := yaml.UnmarshalStrict(text, into); err != nil {
			t.Errorf("%s: %v", r.GetKind(), err)
		}
		all[r.GetKind()] = into
	}
	return all
}

func TestKubernetes_isWhatTheAPITakesAndFitsTogether(t *testing.T) {
	all := objects(t)
	deployment, service := all["Deployment"].(*apps.Deployment), all["Service"].(*core.Service)
	budget, network, ingress := all["PodDisruptionBudget"].(*policy.PodDisruptionBudget), all["NetworkPolicy"].(*networking.NetworkPolicy), all["Ingress"].(*networking.Ingress)
	pod := deployment.Spec.Template
	for what, selector := range map[string]map[string]string{
		"Deployment": deployment.Spec.Selector.MatchLabels, "Service": service.Spec.Selector,
		"PodDisruptionBudget": budget.Spec.Selector.MatchLabels, "NetworkPolicy": network.Spec.PodSelector.MatchLabels,
	} {
		for k, v := range selector {
			if pod.Labels[k] != v {
				t.Errorf("%s selects %s=%s, and pods have %q", what, k, v, pod.Labels[k])
			}
		}
		if len(selector) == 0 {
			t.Errorf("%s selects everything", what)
		}
	}
	c := pod.Spec.Containers[0]
	drain := time.Duration(0)
	for _, arg := range c.Args {
		if text, ok := strings.CutPrefix(arg, "-drain="); ok {
			drain, _ = time.ParseDuration(text)
		}
	}
	if grace := time.Duration(*pod.Spec.TerminationGracePeriodSeconds) * time.Second; drain == 0 || grace < drain+5*time.Second {
		t.Errorf("the grace period is %v, and -drain %v", grace, drain)
	}
	port := c.Ports[0].Name
	for what, p := range map[string]*core.Probe{"startup": c.StartupProbe, "readiness": c.ReadinessProbe, "liveness": c.LivenessProbe} {
		if p == nil || p.HTTPGet == nil || p.HTTPGet.Port.StrVal != port {
			t.Errorf("the %s probe is %+v", what, p)
		}
	}
	if c.LivenessProbe.HTTPGet.Path != "/healthz" || c.StartupProbe.HTTPGet.Path != "/readyz" {
		t.Error("a node that waits for Redis would be restarted, or be given viewers before it has seen Redis")
	}
	if service.Spec.Ports[0].TargetPort.StrVal != port || network.Spec.Ingress[0].Ports[0].Port.StrVal != port {
		t.Error("Service or NetworkPolicy lead to another port")
	}
	if got := ingress.Spec.Rules[0].HTTP.Paths[0].Backend.Service; got.Name != service.Name || got.Port.Name != service.Spec.Ports[0].Name {
		t.Errorf("the Ingress leads to %+v", got)
	}
	// https://kubernetes.io/docs/concepts/security/pod-security-standards/, restricted
	if s, p := c.SecurityContext, pod.Spec.SecurityContext; !*p.RunAsNonRoot || *p.RunAsUser == 0 || p.SeccompProfile.Type != core.SeccompProfileTypeRuntimeDefault ||
		*s.AllowPrivilegeEscalation || !*s.ReadOnlyRootFilesystem || !slices.Equal(s.Capabilities.Drop, []core.Capability{"ALL"}) {
		t.Errorf("pods are not restricted: %+v %+v", p, s)
	}
	if c.Resources.Limits.Memory().Value() != 512<<20 {
		t.Errorf("the limit of memory is %v", c.Resources.Limits.Memory())
	}
	for _, rule := range network.Spec.Ingress {
		if len(rule.From) == 0 {
			t.Errorf("every pod may call %v", rule.Ports)
		}
	}
	if mode := pod.Spec.Volumes[0].Secret.DefaultMode; mode == nil || *mode&0o007 != 0 {
		t.Error("everybody in the container may read the secret")
	}
	knownFlags(t, c.Args...)
	for _, e := range c.Env {
		if e.Name == "GOMEMLIMIT" {
			continue
		}
		knownVariable(t, e.Name)
		if e.Name == modelKey && (e.ValueFrom == nil || e.ValueFrom.SecretKeyRef == nil || e.ValueFrom.SecretKeyRef.Optional == nil || !*e.ValueFrom.SecretKeyRef.Optional) {
			t.Errorf("the key of a model is no secret, or has to be there: %+v", e)
		}
	}
}

// flags are those that main.go and the packages declare.
var flags = func() map[string]bool {
	all := map[string]bool{}
	for _, pattern := range []string{"main.go", "*/flags.go", "*/*/flags.go"} {
		files, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil || len(files) == 0 {
			panic(fmt.Sprint(pattern, err))
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				panic(err)
			}
			for _, m := range regexp.MustCompile(`(?:fs\.\w+\(|size\.Var\(fs, )[^"\n]*"([a-z0-9-]+)"`).FindAllStringSubmatch(string(text), -1) {
				all[m[1]] = true
			}
		}
	}
	return all
}()

// modelKey is the one variable that is no flag.
var modelKey = func() string {
	text, err := os.ReadFile(filepath.Join(root, "api/model/openai.go"))
	if err != nil {
		panic(err)
	}
	return string(regexp.MustCompile(`KeyVariable = "(\w+)"`).FindSubmatch(text)[1])
}()

func knownFlags(t *testing.T, args ...string) {
	t.Helper()
	for _, arg := range args {
		if name, _, _ := strings.Cut(strings.TrimLeft(arg, "-"), "="); !flags[name] {
			t.Errorf("there is no flag %s", arg)
		}
	}
}

func knownVariable(t *testing.T, name string) {
	t.Helper()
	if name == modelKey {
		return
	}
	if of, ok := strings.CutPrefix(name, "GAPLESS_"); !ok || !flags[strings.ToLower(strings.ReplaceAll(of, "_", "-"))] {
		t.Errorf("there is no variable %s", name)
	}
}

func TestCompose_loadsAndFitsTogether(t *testing.T) {
	options, err := cli.NewProjectOptions([]string{filepath.Join(root, "compose.yaml")}, cli.WithoutEnvironmentResolution, cli.WithEnv([]string{"REDIS_PASSWORD=sesame"}))
	if err != nil {
		t.Fatal(err)
	}
	project, err := options.LoadProject(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	targets, err := os.ReadFile(filepath.Join(root, "deploy/compose/prometheus.yml"))
	if err != nil {
		t.Fatal(err)
	}
	conf, err := os.ReadFile(filepath.Join(root, "deploy/nginx/nginx.conf"))
	if err != nil {
		t.Fatal(err)
	}
	for i, name := range []string{"a", "b", "c"} {
		s := project.Services[name]
		drain, err := time.ParseDuration(*s.Environment["GAPLESS_DRAIN"])
		if err != nil || s.StopGracePeriod == nil || time.Duration(*s.StopGracePeriod) < drain+3*time.Second {
			t.Errorf("%s drains for %v, and is killed after %v", name, drain, s.StopGracePeriod)
		}
		if *s.Environment["GAPLESS_NODE"] != name {
			t.Errorf("%s is called %s", name, *s.Environment["GAPLESS_NODE"])
		}
		for variable := range s.Environment {
			if variable != "GOMEMLIMIT" {
				knownVariable(t, variable)
			}
		}
		if s.MemLimit != 512<<20 || *s.Environment["GOMEMLIMIT"] != "460MiB" {
			t.Errorf("%s has %d bytes, and GOMEMLIMIT %s", name, s.MemLimit, *s.Environment["GOMEMLIMIT"])
		}
		if address := s.Networks["watch"].Ipv4Address + ":9090"; *s.Environment["GAPLESS_METRICS"] != address || !bytes.Contains(targets, []byte(`"`+address+`"`)) {
			t.Errorf("%s is not scraped where its metrics are, %s", name, *s.Environment["GAPLESS_METRICS"])
		}
		if *s.Environment["GAPLESS_REDIS"] != "redis://:sesame@redis:6379" {
			t.Errorf("%s has no password for Redis", name)
		}
		from := "127.0.0.1:" + strconv.Itoa(8081+i)
		if command := strings.Join(project.Services["nginx"].Command, " "); !strings.Contains(command, "s/"+from+"/"+name+":8080/") || !bytes.Contains(conf, []byte(from)) {
			t.Errorf("nginx does not know %s: %s", name, command)
		}
	}
	for name, networks := range map[string][]string{"redis": {"store"}, "nginx": {"edge"}, "prometheus": {"watch"}, "grafana": {"watch"}} {
		if got := slices.Sorted(maps.Keys(project.Services[name].Networks)); !slices.Equal(got, networks) {
			t.Errorf("%s is on %q", name, got)
		}
	}
	for name, s := range project.Services {
		for _, p := range s.Ports {
			if p.HostIP != "127.0.0.1" {
				t.Errorf("%s is published at %q", name, p.HostIP)
			}
		}
		for _, v := range s.Volumes {
			if v.Type != types.VolumeTypeBind {
				continue
			}
			if _, err := os.Stat(v.Source); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	if command := strings.Join(project.Services["redis"].Command, " "); !strings.Contains(command, "--appendonly yes") || !strings.Contains(command, `--requirepass "$REDISCLI_AUTH"`) ||
		*project.Services["redis"].Environment["REDISCLI_AUTH"] != "sesame" {
		t.Errorf("Redis does not keep what it acknowledges, or is open: %s", command)
	}
	grafana := project.Services["grafana"].Environment
	if *grafana["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] != "true" || *grafana["GF_AUTH_ANONYMOUS_ORG_ROLE"] != "Viewer" {
		t.Error("Grafana has an admin whose password everybody knows")
	}
}

func TestDockerfile_isParsedAndEndsInAnImageWithoutRoot(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root, "Dockerfile"))
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := parser.Parse(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	if len(parsed.Warnings) > 0 {
		t.Errorf("%+v", parsed.Warnings)
	}
	stages, _, err := instructions.Parse(parsed.AST, nil)
	if err != nil {
		t.Fatal(err)
	}
	last := stages[len(stages)-1]
	user, entry := "", []string(nil)
	for _, c := range last.Commands {
		switch c := c.(type) {
		case *instructions.UserCommand:
			user = c.User
		case *instructions.EntrypointCommand:
			entry = c.CmdLine
			if c.PrependShell {
				t.Error("the entrypoint wants a shell")
			}
		case *instructions.EnvCommand:
			for _, e := range c.Env {
				knownVariable(t, e.Key)
			}
		}
	}
	if last.BaseName != "scratch" || !regexp.MustCompile(`^[1-9]\d+:[1-9]\d+$`).MatchString(user) || !slices.Equal(entry, []string{"/gapless"}) {
		t.Errorf("from %s, as %q, run %q", last.BaseName, user, entry)
	}
	// The Go that builds it is the one that go.mod asks for.
	mod, err := os.ReadFile(filepath.Join(root, "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	if of := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindSubmatch(mod)[1]; !bytes.Contains(text, fmt.Appendf(nil, "golang:%s-", of)) {
		t.Errorf("it is not built by Go %s", of)
	}
}

// run runs a tool that make test installs, and answers what it said.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Errorf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

func TestSystemd_acceptsTheUnitAndCallsItHardened(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root, "deploy/systemd/gapless.service"))
	if err != nil {
		t.Fatal(err)
	}
	unit := filepath.Join(t.TempDir(), "gapless.service")
	changed := bytes.ReplaceAll(text, []byte("/usr/local/bin/gapless"), []byte("/bin/true")) // it looks whether it is there
	if err := os.WriteFile(unit, changed, 0o600); err != nil {
		t.Fatal(err)
	}
	if said := run(t, "systemd-analyze", "verify", "--man=no", unit); said != "" { // what it does not know it only mentions
		t.Error(said)
	}
	run(t, "systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold=15", unit) // 1.5 of 10
}

func TestPrometheus_acceptsItsConfiguration(t *testing.T) {
	dir := t.TempDir()
	for _, file := range []string{"deploy/compose/prometheus.yml", "deploy/prometheus/alerts.yml"} {
		text, err := os.ReadFile(filepath.Join(root, file))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, filepath.Base(file)), text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	run(t, "promtool", "check", "config", filepath.Join(dir, "prometheus.yml"))
}
