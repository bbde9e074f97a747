package main

import "slices"

// commands is the table of everything m3o does. Groups come in the order of
// their first command.
func commands() []*command {
	all := slices.Concat(
		basicCommands(),
		deployCommands(),
		accessCommands(),
		requestCommands(),
		controlCommands(),
		scheduleCommands(),
		notifyCommands(),
		repoCommands(),
		domainsCommands(),
		psCommands(),
		storageCommands(),
		runCommands(),
		logCommands(),
		doctorCommands(), linkCommands(),
		helpCommands(),
	)
	order := map[string]int{}
	for _, c := range all {
		if _, ok := order[c.group]; !ok {
			order[c.group] = len(order)
		}
	}
	slices.SortStableFunc(all, func(a, b *command) int { return order[a.group] - order[b.group] })
	return all
}

// basicCommands are about the session, apps, releases, config, instances, keys and users.
func basicCommands() []*command {
	number := flag{"number", "n", "N", "how many"}
	preview := flag{"preview", "", "", "what previews of the app get, over its own variables"}
	noRestart := flag{"no-restart", "", "", "keep the change for the next release"}
	return []*command{
		{name: "login", group: "Session", args: "[URL]", max: 1, run: runLogin, completes: "server",
			short: "Log in to a server by your SSH key",
			long: `The server is challenged and the key signs: the one of --key, else those of the SSH agent, else ~/.ssh/id_ed25519,
id_ecdsa or id_rsa. A private key never leaves this computer, and is not opened when the agent has it. Keys of security
devices (sk-…) cannot be used.

Where the server's certificate is signed by a CA of its own, the CA's fingerprint is shown; compare it with the one m3od
printed at its first start. --ca-fingerprint or --ca answer beforehand. The token and the CA are stored in
$XDG_CONFIG_HOME/m3o/config.json, which only you can read.

In CI no login is needed: set M3O_URL, M3O_TOKEN (or M3O_TOKEN_FILE) and, for a CA of its own, M3O_CA_FILE.`,
			example: "m3o login https://api.example.com\nm3o login https://api.localhost:8443 --code-stdin < code",
			flags: []flag{
				{"code", "", "CODE", "make the first admin with the one-time code that m3od printed"},
				{"code-stdin", "", "", "read that code from stdin"},
				{"user", "", "NAME", "with a code: the name of the admin (default admin)"},
				{"key", "", "FILE", "the SSH key to use, private or public"},
				{"ca-fingerprint", "", "SHA256", "believe the server's own CA if it has this fingerprint"},
				{"ca", "", "FILE", "believe only this CA (PEM)"},
			}},
		{name: "logout", group: "Session", run: runLogout, short: "Revoke the token and forget it"},
		{name: "whoami", aliases: []string{"auth:whoami"}, group: "Session", run: runWhoami, short: "Show who you are to the server"},
		{name: "env", aliases: []string{"env:list"}, group: "Session", run: runEnv, short: "List the servers you logged in to"},
		{name: "env:use", aliases: []string{"env:set"}, group: "Session", args: "SERVER", min: 1, max: 1, run: runEnvUse, completes: "server",
			short: "Choose the server that commands speak to", example: "m3o env:use example.com"},
		{name: "trust", group: "Session", run: runTrust,
			short: "Let this computer trust the server's own CA",
			long: `Installs the CA into the store of the system and into those of Chromium and Firefox (by certutil, when it is there), and
prints what it did. What needs root is printed as a command to run. The CA of a server on localhost can speak for localhost only.`,
			example: "m3o trust\nm3o trust --print > ca.crt\nm3o trust --uninstall",
			flags: []flag{
				{"print", "", "", "write the certificate to stdout and change nothing"},
				{"uninstall", "", "", "take it out again"},
				{"yes", "y", "", "install also a CA that could speak for any site"},
			}},

		{name: "create", aliases: []string{"apps:create"}, group: "Apps", args: "[APP]", max: 1, run: runCreate,
			short:   "Make an app and its git remote",
			long:    "Without a name the server finds a readable one. In a git repository the remote m3o is added.",
			example: "m3o create hello\ngit push m3o main",
			flags:   []flag{appFlag, {"branch", "b", "BRANCH", "the branch whose pushes deploy (default main)"}, remoteFlag, {"no-remote", "", "", "add no git remote"}}},
		{name: "apps", aliases: []string{"apps:list"}, group: "Apps", run: runApps, short: "List the apps"},
		{name: "info", aliases: []string{"apps:info"}, group: "Apps", args: "[APP]", max: 1, app: true, appArg: true, run: runInfo, completes: "app",
			short: "Show one app"},
		{name: "open", aliases: []string{"apps:open"}, group: "Apps", args: "[APP]", max: 1, app: true, appArg: true, run: runOpen, completes: "app",
			short: "Open an app's URL in the browser", flags: []flag{{"print", "", "", "only print it"}}},
		{name: "destroy", aliases: []string{"apps:destroy", "kill"}, group: "Apps", args: "[APP]", max: 1, app: true, appArg: true, run: runDestroy, completes: "app",
			short: "Remove an app with all it has",
			long:  "Its releases, repository, config and instances are gone for good. The name must be typed again, or given to --confirm.",
			flags: []flag{{"confirm", "", "APP", "the app's name again, instead of the question"}}},
		{name: "git:remote", group: "Apps", args: "[APP]", max: 1, run: runGitRemote, completes: "app",
			short: "Point the git remote of this repository at an app", example: "m3o git:remote -a hello",
			flags: []flag{appFlag, remoteFlag}},

		{name: "releases", aliases: []string{"releases:list"}, group: "Deploys", app: true, run: runReleases, short: "List the releases of an app, newest first", flags: []flag{number}},
		{name: "releases:info", group: "Deploys", args: "[RELEASE]", max: 1, app: true, run: runReleasesInfo, completes: "release",
			short:   "Show a release whole: image, config, processes, API; the live one's without a number",
			example: "m3o releases:info\nm3o releases:info v12 --json"},
		{name: "rollback", aliases: []string{"releases:rollback"}, group: "Deploys", args: "[RELEASE]", max: 1, app: true, run: runRollback, completes: "release",
			short:   "Make an earlier release live again, without a build",
			long:    "Its image, config and processes become a new release. Without a release it is the one before the live one.",
			example: "m3o rollback\nm3o rollback v12 -a hello"},
		{name: "builds", aliases: []string{"builds:list"}, group: "Deploys", app: true, run: runBuilds, short: "List the builds of an app, newest first", flags: []flag{number}},
		{name: "builds:output", aliases: []string{"builds:log"}, group: "Deploys", args: "[BUILD]", max: 1, app: true, run: runBuildsOutput, completes: "build",
			short:   "Show what a build printed, the newest one's without a number",
			long:    "The exit status tells whether the output could be read, not how the build went.",
			example: "m3o builds:output -f\nm3o builds output 7",
			flags:   []flag{{"follow", "f", "", "go on until the build ends"}}},

		{name: "config", aliases: []string{"config:list"}, group: "Config", app: true, run: runConfig,
			short: "Show the variables of an app; secret values are not shown", flags: []flag{preview}},
		{name: "config:set", aliases: []string{"config:add"}, group: "Config", args: "NAME=VALUE…", min: 1, max: -1, app: true, run: runConfigSet, completes: "var",
			short: "Set variables, which makes a release",
			long: `NAME=- reads the value from stdin or, on a terminal, asks without showing it, so that it is in no list of processes and no
history. One newline at the end is left out. With --secret the values of this command are never shown again.`,
			example: "m3o config:set GREETING=Hello MODE=fast\nm3o config:set API_KEY=- --secret < key.txt",
			flags:   []flag{{"secret", "s", "", "never show the values again"}, noRestart, preview}},
		{name: "config:get", group: "Config", args: "NAME", min: 1, max: 1, app: true, run: runConfigGet, completes: "var", short: "Print the value of one variable"},
		{name: "config:unset", aliases: []string{"config:remove", "config:del"}, group: "Config", args: "NAME…", min: 1, max: -1, app: true, run: runConfigUnset, completes: "var",
			short: "Remove variables, which makes a release", flags: []flag{noRestart, preview}},

		{name: "status", group: "Running", args: "[APP]", max: 1, app: true, appArg: true, run: runStatus, completes: "app",
			short: "The instances of an app or, where none is named, all apps"},
		{name: "keys", aliases: []string{"keys:list"}, group: "Keys and users", run: runKeys, short: "List your SSH keys",
			flags: []flag{{"user", "", "NAME", "those of another user (admins)"}}},
		{name: "keys:add", group: "Keys and users", args: "[FILE]", max: 1, run: runKeysAdd, completes: "file",
			short: "Register a public SSH key; - reads it from stdin", example: "m3o keys:add ~/.ssh/id_ed25519.pub",
			flags: []flag{{"user", "", "NAME", "for another user (admins)"}}},
		{name: "keys:remove", group: "Keys and users", args: "KEY", min: 1, max: 1, run: runKeysRemove, completes: "key",
			short: "Remove an SSH key by its fingerprint or name", flags: []flag{{"user", "", "NAME", "look for the name among this user's (admins)"}}},
		{name: "users:create", group: "Keys and users", args: "NAME", min: 1, max: 1, run: runUsersCreate,
			short: "Make a user (admins)", example: "m3o users:create ada --key ada.pub",
			flags: []flag{{"admin", "", "", "who may do everything"}, {"key", "", "FILE", "their public SSH key"}}},
	}
}

// helpCommands are about m3o itself, and what says where a command went.
func helpCommands() []*command {
	return []*command{
		{name: "completion", group: "Help", args: "bash|zsh|fish", min: 1, max: 1, run: runCompletion, completes: "shell",
			short: "Print what makes a shell complete m3o", long: "Commands, flags, and names from the server, which has a second to answer.",
			example: `source <(m3o completion bash)` + "\n" + `m3o completion fish > ~/.config/fish/completions/m3o.fish`},
		{name: "version", group: "Help", run: runVersion, short: "Show the version of this program"},
		{name: "help", group: "Help", args: "[COMMAND]", max: 2, run: runHelp, completes: "command", short: "Show help",
			flags: []flag{{"markdown", "", "", "print the reference of all commands"}}},

		{name: "update", hidden: true, max: -1, run: instead("there is no update: a push is one", "git push m3o main")},
		{name: "__complete", hidden: true, max: -1, run: runComplete},
	}
}
