package main

import (
	"context"
	"fmt"
	"io"

	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
)

// storageCommands are about the volumes of an app.
func storageCommands() []*command {
	process := flag{"process", "p", "TYPE", "the process type (default web)"}
	return []*command{
		{name: "storage", aliases: []string{"storage:list", "volumes"}, group: "Storage", args: "[APP]", max: 1, app: true, appArg: true, run: runStorage, completes: "app",
			short: "List the volumes of an app"},
		{name: "storage:create", group: "Storage", args: "VOLUME", min: 1, max: 1, app: true, run: runStorageCreate,
			short: "Make a volume: a directory that outlives every instance", example: "m3o storage:create data\nm3o storage:mount data /data"},
		{name: "storage:mount", group: "Storage", args: "VOLUME PATH", min: 2, max: 2, app: true, run: runStorageMount, flags: []flag{process},
			short: "Mount a volume in a process type",
			long: `The process type then has at most one instance, as two must not write to the same files, and a deploy stops the old one before it
starts the new one; requests wait meanwhile. Mounting restarts the instance.`,
			example: "m3o storage:mount data /data -p web"},
		{name: "storage:unmount", group: "Storage", args: "VOLUME", min: 1, max: 1, app: true, run: runStorageUnmount,
			short: "Unmount a volume; its files stay", long: "The instance is restarted without it."},
		{name: "storage:destroy", group: "Storage", args: "VOLUME", min: 1, max: 1, app: true, run: runStorageDestroy,
			short: "Remove a volume with all its files", long: "It must be mounted nowhere. The name must be typed again, or given to --confirm.",
			flags: []flag{{"confirm", "", "VOLUME", "the volume's name again, instead of the question"}}},
	}
}

func runStorage(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.volumes.List, &m3ov1.ListVolumesRequest{App: app})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		if len(res.GetVolumes()) == 0 {
			c.say("%s has no volumes", app)
			c.hint("m3o storage:create data -a %s", app)
			return
		}
		var rows [][]string
		dirs := false
		for _, v := range res.GetVolumes() {
			row := []string{plain(v.GetName()), plain(v.GetProcess()), plain(v.GetPath()), size(v.GetBytes()), c.when(v.GetCreated())}
			if v.GetDirectory() != "" {
				dirs = true
				row = append(row, plain(v.GetDirectory()))
			}
			rows = append(rows, row)
		}
		head := []string{"VOLUME", "PROCESS", "PATH", "SIZE", "CREATED"}
		if dirs {
			head = append(head, "DIRECTORY")
		}
		c.table(head, rows)
	})
}

func runStorageCreate(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	name := c.args[0]
	res, err := ask(ctx, cl.volumes.Create, &m3ov1.CreateVolumeRequest{App: app, Volume: name})
	if err != nil {
		return err
	}
	if err := c.result(res, func() { c.print("created volume %s\n", plain(name)) }); err != nil {
		return err
	}
	c.hint("m3o storage:mount %s /%s -a %s", name, name, app)
	return nil
}

func runStorageMount(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	process := "web"
	if c.has("process") {
		process = c.value("process")
	}
	res, err := ask(ctx, cl.volumes.Mount, &m3ov1.MountVolumeRequest{App: app, Volume: c.args[0], Path: c.args[1], Process: process})
	if err != nil {
		return err
	}
	if err := c.result(res, func() { c.print("mounted %s at %s in %s\n", plain(c.args[0]), plain(c.args[1]), plain(process)) }); err != nil {
		return err
	}
	c.undo("m3o storage:unmount %s -a %s", c.args[0], app)
	return nil
}

func runStorageUnmount(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.volumes.Unmount, &m3ov1.UnmountVolumeRequest{App: app, Volume: c.args[0]})
	if err != nil {
		return err
	}
	return c.result(res, func() { c.print("unmounted %s; its files are kept\n", plain(c.args[0])) })
}

func runStorageDestroy(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	name := c.args[0]
	if c.has("confirm") {
		if c.value("confirm") != name {
			return misuse(fmt.Sprintf("--confirm says %s, but the volume is %s: nothing was destroyed", c.value("confirm"), name), "")
		}
	} else {
		if !c.inTerminal {
			return misuse("destroying a volume needs a confirmation, and there is no terminal to ask on", "m3o storage:destroy "+name+" -a "+app+" --confirm "+name)
		}
		c.say("This removes the volume %s of %s with all its files. It cannot be undone.", name, app)
		typed, err := c.system.ask(ctx, "Type the name of the volume to go on:")
		if err != nil && err != io.EOF {
			return err
		}
		if typed != name {
			return fail("not confirmed: nothing was destroyed", "")
		}
	}
	res, err := ask(ctx, cl.volumes.Destroy, &m3ov1.DestroyVolumeRequest{App: app, Volume: name, Confirm: name})
	if err != nil {
		return err
	}
	return c.result(res, func() { c.print("destroyed volume %s\n", plain(name)) })
}
