# Functions for the other scripts, which dot-source this file. They do the same as the functions in venv.sh.
Set-StrictMode -Version Latest
$ErrorActionPreference = 'Stop'

function Find-Python {
    foreach ($candidate in @($env:PYTHON, 'py', 'python3', 'python')) {
        if (-not $candidate -or -not (Get-Command $candidate -ErrorAction SilentlyContinue)) { continue }
        & $candidate -c 'import sys; sys.exit(sys.version_info < (3, 10))' | Out-Null
        if ($LASTEXITCODE -eq 0) { return $candidate }
    }
    [Console]::Error.WriteLine('error: no Python 3.10 or newer on PATH: install one (https://www.python.org/downloads/), or name it in PYTHON')
    exit 1
}

function Invoke-Checked {
    # Run a program with its arguments. If its exit code is not 0, exit with that code.
    $program, $arguments = $args
    & $program @arguments | Out-Host
    if ($LASTEXITCODE -ne 0) { exit $LASTEXITCODE }
}

function Get-EnvironmentPython {
    # Return the path of the Python in an environment's folder, if it is new enough and can install packages; else nothing.
    param([Parameter(Mandatory)][string]$Folder)

    foreach ($name in @('Scripts/python.exe', 'python.exe', 'bin/python')) {
        $candidate = Join-Path $Folder $name
        if (-not (Test-Path $candidate)) { continue }
        & $candidate -c 'import sys, pip; sys.exit(sys.version_info < (3, 10))' | Out-Null
        if ($LASTEXITCODE -eq 0) { return $candidate }
    }
}

function Get-ActiveEnvironment {
    # Return the folder of the active environment, or nothing. Conda's base environment is shared, so it does not count.
    if ($env:VIRTUAL_ENV) { return $env:VIRTUAL_ENV }
    if ($env:CONDA_PREFIX -and $env:CONDA_DEFAULT_ENV -and $env:CONDA_DEFAULT_ENV -ne 'base') { return $env:CONDA_PREFIX }
}

function Initialize-Venv {
    # Install Atlas with these extras into .venv, or with -UseActive into the active environment, and return the path of its
    # Python.
    param([Parameter(Mandatory)][string]$Extras, [switch]$UseActive)

    $environment = Join-Path (Get-Location) '.venv'
    $active = if ($UseActive) { Get-ActiveEnvironment }
    if ($active -and (Get-EnvironmentPython $active)) {
        $environment = $active
        [Console]::Error.WriteLine("using the active environment $environment")
    }
    $python = Get-EnvironmentPython $environment
    if (-not $python) {
        Invoke-Checked (Find-Python) -m venv .venv
        $python = Get-EnvironmentPython $environment
    }
    $stamp = Join-Path $environment "atlas-installed-$Extras.txt"
    # Compare the folder too: the environment may contain the Atlas of another clone.
    $wanted = (Get-Location).Path + "`n" + (Get-Content -Raw -Encoding utf8 pyproject.toml) + (Get-Content -Raw -Encoding utf8 requirements.txt)
    if (-not (Test-Path $stamp) -or (Get-Content -Raw -Encoding utf8 $stamp) -ne $wanted) {
        [Console]::Error.WriteLine("installing Atlas and the missing packages into $environment (PyTorch takes minutes)")
        # Install the pinned PyTorch first: pip resolves all other packages against it.
        Invoke-Checked $python -m pip install --quiet --disable-pip-version-check --no-input -r requirements.txt
        Invoke-Checked $python -m pip install --quiet --disable-pip-version-check --no-input -e ".[$Extras]"
        Set-Content -NoNewline -Encoding utf8 -Path $stamp -Value $wanted
    }
    return $python
}
